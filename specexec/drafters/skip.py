"""The target drafts for itself with some of its sublayers (Draft & Verify, Zhang et al. 2024). Knows no file.

Which attentions and MLPs stay is searched: the set that should write the most tokens per second, as far as the target's
own answers to a few questions show. What stays in memory anyway costs nothing to keep; copies of what streams must fit
into the room given. The drafter has keys and values of its own: the target's cache is never touched.
L layers   S = 2 sublayers: attention, MLP   U units that stay or go   R rows of a text   K ranks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specexec.drafters.cascade import Cascade
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.cache import KVCache
from specexec.model.sublayers import Kept, masked, partial_lm
from specexec.model.submodel import layer_list_path
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import SKIP_SHARE
from specexec.tree.static_shape import static_tree
from specexec.tree.tree import Floats

TRIES = 128  # sets that a search looks at, where they are cheap
TOGETHER = 16  # of them in one sweep over the target
PARENTS = 2  # the best so far, from which new ones are made
FLIPS = 3  # sublayers at most that a new one changes
# Multiplications that a search may take: minutes of a small CPU, seconds of a GPU.
WORK = {"cpu": 1e14}
MORE_WORK = 2e15
WIRE = 20.0  # how much slower weights travel than they are read where they are
NODES = 64  # of the trees that a set is judged by,
RANKS = 32  # children of a node among them, and
LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # their depths
# What the target answers to these is the text on which sets are tried: no other predicts so well what they will guess.
QUESTIONS = (
    "Write a short story about a harbour.",
    "How do I test a program?",
    "Explain how to read a file in Python.",
    "What happened in the year 1969?",
)
ANSWER = 24  # tokens of each


@dataclass(frozen=True)
class Terms:
    """What sublayers cost. copy_LS: bytes that keeping one takes, zero where it is in memory anyway; most_B of them."""

    copy_LS: NDArray[np.int64]
    size_LS: NDArray[np.int64]
    head_B: int
    most_B: int
    whole: bool  # layers stay or go as one
    rows: int  # that one sweep of the search may have

    def copied_B(self, kept_LS: Kept) -> int:
        return int(self.copy_LS[kept_LS].sum())

    def fits(self, kept_LS: Kept) -> bool:
        return self.copied_B(kept_LS) <= self.most_B

    def speed(self, kept_LS: Kept, chance_K: Floats) -> float:
        """Tokens that a set should write in the time of one pass over the whole target where it is in memory.

        A sweep and as many drafter passes as make it best, over trees of the likeliest ranks (Sequoia); for a chain
        it is theorem 3.8 of Leviathan et al. 2023.
        """
        all_B = self.size_LS.sum() + self.head_B
        sweep = 1 + WIRE * self.size_LS[self.copy_LS > 0].sum() / all_B
        draft = (self.size_LS[kept_LS].sum() + self.head_B) / all_B
        tokens = [1 + static_tree(chance_K, NODES, depth).chances_N.sum() for depth in LEVELS]
        return max(float(made / (sweep + depth * draft)) for made, depth in zip(tokens, LEVELS, strict=True))

    def starts(self) -> list[Kept]:
        """Layers spread evenly, those in memory first, and the same with the attentions of all layers."""
        count = len(self.size_LS)
        resident = [not any(copied_S) for copied_S in self.copy_LS.tolist()]
        found = []
        for share in (0.5, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875, 1.0):
            kept_LS = np.zeros((count, 2), bool)
            kept_LS[preferred(resident, share)] = True
            more_LS = kept_LS.copy()
            more_LS[:, 0] |= not self.whole
            found += [kept_LS, more_LS]
        found += [np.array(resident)[:, None].repeat(2, 1), np.zeros((count, 2), bool)]
        return [kept_LS for kept_LS in found if self.fits(kept_LS)]

    def units(self) -> NDArray[np.int64]:
        """Which sublayers (flat numbers, [U, n]) stay or go together."""
        return np.arange(self.size_LS.size).reshape(-1, 2 if self.whole else 1)


def skipping(
    target: TreeLM,
    layer_of: Callable[[int], nn.Module],
    kept_LS: Kept,
    vocabulary: int,
    ranking: Ranking | None = None,
    cascade: Cascade | None = None,
    never: Iterable[int] = (),
    window: int | None = None,
) -> SiblingDrafter:
    """A drafter that runs just these sublayers of the target, in layers of its own that `layer_of` gives."""
    lm = partial_lm(target, layer_of, kept_LS)
    return SiblingDrafter(lm, vocabulary, ranking, name="skip", cascade=cascade, never=never, window=window)


def spread(count: int, kept: int) -> list[int]:
    """`kept` of `count` layers, evenly, the first and the last among them: they translate from and to tokens."""
    if kept <= 1:
        return [0][:kept]
    return sorted({round(i * (count - 1) / (kept - 1)) for i in range(kept)})


def preferred(resident: Items[bool], share: float = SKIP_SHARE) -> list[int]:
    """Layers to keep: resident ones first (they cost no memory and no time to fetch), the gaps filled evenly."""
    count = len(resident)
    kept = max(1, round(share * count))
    at_home = [layer for layer, here in enumerate(resident) if here]
    if len(at_home) >= kept:
        return [at_home[i] for i in spread(len(at_home), kept)]
    fill = sorted(spread(count, kept), key=lambda layer: (layer in at_home, layer))
    return sorted({*at_home, *[layer for layer in fill if layer not in at_home][: kept - len(at_home)]})


def best_sublayers(
    target: TreeLM,
    terms: Terms,
    prompts: Items[list[int]],
    name: str,
    found: MutableMapping[str, NDArray[np.generic]],
    progress: Callable[[int, int], None] = lambda tried, most: None,
) -> Kept:
    """The set to draft with: `found` before under this `name` and the same terms, else searched for and added to it.

    `progress` is called with the sets that were tried, and the most that will be.
    """
    key = _key(name, terms, prompts)
    known = found.get(key)
    if known is not None and known.shape == terms.size_LS.shape and terms.fits(known.astype(bool)):
        return known.astype(bool)
    texts = own_words(target, prompts)
    rows = sum(map(len, texts))
    judge = Judge(target, texts, terms)
    numbers = sum(parameter.numel() for parameter in target.model.parameters()) + terms.size_LS.sum() / 2
    tries = int(np.clip(WORK.get(target.device.type, MORE_WORK) / (numbers * rows), 1, TRIES))
    best_LS = searched(terms, judge.speeds, tries, min(TOGETHER, max(1, terms.rows // rows)), progress)
    found[key] = best_LS.astype(np.uint8)
    return best_LS


def own_words(target: TreeLM, prompts: Items[list[int]]) -> list[list[int]]:
    """The prompts and what the target itself writes below them, greedily."""
    texts, caches = [list(prompt) for prompt in prompts], [KVCache() for _ in prompts]
    for _ in range(ANSWER):
        fresh = [text[len(cache) :] for text, cache in zip(texts, caches, strict=True)]
        parts = [Rows.text(cache, new) for cache, new in zip(caches, fresh, strict=True)]
        for text, part, hidden_RH in zip(texts, parts, target.forward(parts), strict=True):
            part.cache.commit(range(len(part.tokens)))
            text.append(int(target.head(hidden_RH[-1:]).argmax()))
    return texts


class Judge:
    """Tries sets on texts of the target, many in one sweep over it."""

    def __init__(self, target: TreeLM, texts: Items[list[int]], terms: Terms) -> None:
        self._target, self._texts, self._terms = target, texts, terms
        whole_LS = np.ones(terms.size_LS.shape, bool)
        self._chosen_R = next(choices(target, texts, [whole_LS])).argmax(-1)

    def chances(self, sets: Items[Kept]) -> Iterator[Floats]:
        """How often a set's candidates of each rank are the target's choice, [K]; one set after the other."""
        return (ranks(logits_RV, self._chosen_R) for logits_RV in choices(self._target, self._texts, sets))

    def speeds(self, sets: Items[Kept]) -> list[float]:
        """How fast each would write."""
        return [self._terms.speed(kept, chance_K) for kept, chance_K in zip(sets, self.chances(sets), strict=True)]


def searched(
    terms: Terms,
    speeds: Callable[[Items[Kept]], list[float]],
    tries: int,
    together: int = TOGETHER,
    progress: Callable[[int, int], None] = lambda tried, most: None,
) -> Kept:
    """The fastest of at most `tries` sets that fit, of equals the one with fewest copies; the same one every time.

    Layers that are spread evenly are tried first, then children of the best.
    """
    rng, units = np.random.default_rng(0), terms.units()
    seen: dict[bytes, Kept] = {}
    merit: dict[bytes, tuple[float, int]] = {}
    waiting = terms.starts()
    while waiting and len(seen) < tries:
        fresh = list({one.tobytes(): one for one in waiting if one.tobytes() not in seen}.values())
        sets = fresh[: min(together, tries - len(seen))]
        for kept_LS, speed in zip(sets, speeds(sets) if sets else [], strict=True):
            seen[kept_LS.tobytes()] = kept_LS
            merit[kept_LS.tobytes()] = (speed, -terms.copied_B(kept_LS))
        progress(len(seen), tries)
        best = sorted(merit, key=merit.__getitem__, reverse=True)[:PARENTS]
        waiting = fresh[len(sets) :] or _children([seen[one] for one in best], units, terms, seen, rng)
    return seen[best[0]]


def _children(
    parents: list[Kept],
    units: NDArray[np.int64],
    terms: Terms,
    seen: Mapping[bytes, Kept],
    rng: np.random.Generator,
) -> list[Kept]:
    """New sets that fit, each like a parent but for a few units; none if they are hard to find."""
    found: dict[bytes, Kept] = {}
    for _ in range(50 * TOGETHER):
        child_LS = parents[int(rng.integers(len(parents)))].copy()
        flipped = rng.choice(len(units), min(int(rng.integers(1, FLIPS + 1)), len(units)), replace=False)
        child_LS.reshape(-1)[units[flipped]] ^= True
        if terms.fits(child_LS) and child_LS.tobytes() not in seen:
            found[child_LS.tobytes()] = child_LS
        if len(found) == TOGETHER:
            break
    return list(found.values())


def choices(target: TreeLM, texts: Items[list[int]], sets: Items[Kept]) -> Iterator[Tensor]:
    """The logits [R, V] that each set gives behind every token of all texts, set by set; one sweep for all."""
    layers = target.model.get_submodule(".".join(layer_list_path(target.model)))
    assert isinstance(layers, nn.ModuleList)
    kept_NLS = torch.from_numpy(np.stack(sets)).to(target.device)
    with masked(layers, kept_NLS.repeat_interleave(sum(map(len, texts)), 0)):
        hidden = target.forward([Rows.text(KVCache(), text) for _ in sets for text in texts])
    count = len(texts)
    return (target.head(torch.cat(hidden[first : first + count])) for first in range(0, len(hidden), count))


def ranks(logits_RV: Tensor, chosen_R: Tensor) -> Floats:
    """How often what the target chose was the best, the second best, … of these candidates; falling, [K]."""
    rank_R = (logits_RV > logits_RV.gather(1, chosen_R.unsqueeze(1))).sum(1).cpu().numpy()
    count_K = np.bincount(rank_R[rank_R < RANKS], minlength=RANKS) + 0.5 / RANKS  # none is impossible
    return np.asarray(np.sort(count_K)[::-1] / (len(rank_R) + 0.5))


def _key(name: str, terms: Terms, prompts: Items[list[int]]) -> str:
    settings = (name, terms.copy_LS.tolist(), terms.size_LS.tolist(), terms.most_B, terms.rows, prompts, TRIES, ANSWER)
    return blake2b(repr(settings).encode(), digest_size=8).hexdigest()
