"""The target drafts for itself with some of its layers (Draft & Verify, Zhang et al. 2024). Knows no file.

The layers that stay are chosen by where they live and, where trying costs nothing, by search: the set whose choices
agree most often with the whole model's on a sample text. Own keys and values: the target's cache is never touched.
L layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

from torch import nn
from transformers import PreTrainedModel

from specexec.cache import KVCache
from specexec.drafters.cascade import Cascade
from specexec.drafters.sibling import SiblingDrafter
from specexec.lm import Rows, TreeLM
from specexec.partial import rebuilt
from specexec.ranking import Ranking

SHARE = 0.5  # of the layers stay: about what the paper's search keeps of a 70B
TRIES = 24  # sets that a search looks at
SAMPLE_ROWS = 96
SAMPLE = (
    "The following example shows how to read a file line by line. If the file does not exist, an error is raised and "
    "the program stops. Most people write a test first: it says what is wanted, and it fails until the work is done. "
    "In the morning the harbour was quiet; three boats had left before dawn, and nobody knew when they would return."
)


def skipping(
    model: PreTrainedModel,
    layers: Mapping[int, nn.Module],
    vocabulary: int,
    ranking: Ranking | None = None,
    cascade: Cascade | None = None,
) -> SiblingDrafter:
    """A drafter that runs just these layers of `model`, in order."""
    lm = TreeLM(rebuilt(model, layers), list(layers))
    return SiblingDrafter(lm, vocabulary, ranking, name="skip", cascade=cascade)


def spread(count: int, kept: int) -> list[int]:
    """`kept` of `count` layers, evenly, the first and the last among them: they translate from and to tokens."""
    if kept <= 1:
        return [0][:kept]
    return sorted({round(i * (count - 1) / (kept - 1)) for i in range(kept)})


def preferred(resident: Items[bool], share: float = SHARE) -> list[int]:
    """Layers to keep: resident ones first (they cost no memory and no time to fetch), the gaps filled evenly."""
    count = len(resident)
    kept = max(1, round(share * count))
    at_home = [layer for layer, here in enumerate(resident) if here]
    if len(at_home) >= kept:
        return [at_home[i] for i in spread(len(at_home), kept)]
    fill = sorted(spread(count, kept), key=lambda layer: (layer in at_home, layer))
    return sorted({*at_home, *[layer for layer in fill if layer not in at_home][: kept - len(at_home)]})


def searched(start: Items[int], count: int, agreement: Callable[[list[int]], float], tries: int = TRIES) -> list[int]:
    """The best set met by swapping one layer at a time, from `start`; at most `tries` sets are looked at, each once."""
    best, best_score = list(start), agreement(list(start))
    seen, improving = {tuple(start)}, True
    while improving:
        improving = False
        for swap in _swaps(best, count):
            if tuple(swap) in seen:
                continue
            if len(seen) == tries:
                return best
            seen.add(tuple(swap))
            if (score := agreement(swap)) > best_score:
                best, best_score, improving = swap, score, True
                break
    return best


def _swaps(kept: list[int], count: int) -> list[list[int]]:
    """Every set that differs in one layer; near swaps first."""
    others = [layer for layer in range(count) if layer not in kept]
    pairs = sorted(((out, new) for out in kept for new in others), key=lambda pair: abs(pair[0] - pair[1]))
    return [sorted({*kept, new} - {out}) for out, new in pairs]


def best_layers(whole: TreeLM, layers: Mapping[int, nn.Module], start: list[int], text: Items[int]) -> list[int]:
    """The layers to keep, as many as `start` has, found by trying on a sample text."""
    expected = choices(whole, text)

    def score(kept: list[int]) -> float:
        partial = rebuilt(whole.model, {layer: layers[layer] for layer in kept})
        return agreement(expected, TreeLM(partial, kept), text)

    return searched(start, len(layers), score)


def agreement(whole: list[int], lm: TreeLM, text: Items[int]) -> float:
    """How often `lm` makes the choices `whole` along a text."""
    ours = choices(lm, text)
    return sum(a == b for a, b in zip(ours, whole, strict=True)) / len(whole)


def choices(lm: TreeLM, text: Items[int]) -> list[int]:
    """The likeliest next token after each token of a text."""
    text = text[:SAMPLE_ROWS]
    (hidden_RH,) = lm.forward([Rows(KVCache(), text, range(-1, len(text) - 1))])
    return [int(token) for token in lm.head(hidden_RH).argmax(-1)]
