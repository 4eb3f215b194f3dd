"""SpecPC (Galim et al. 2025): the drafter's attention chooses the tokens of a long prompt that the target reads.

The target then reads a shorter prompt, as if it had been typed: rows, positions and caches know nothing of this.
What is looked at chooses keys and values too (keys.py).
H heads   G heads of keys   Q last rows   R rows   D width of a head   V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.errors import ContextLengthExceeded
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM

WHOLE = 2048  # tokens that are always read: a sweep over so many takes hardly longer than one over a few
LOOKING = 64  # last tokens, whose attention counts, and which are always read
FIRST = 16  # tokens that are always read
NEIGHBOURS = 16  # tokens on either side of one that is looked at


@dataclass(frozen=True)
class ShortPrompts:
    """Reads a `share` of long prompts, what `drafter` looks at; `always` are control tokens, which stay."""

    share: float
    drafter: TreeLM
    always: Collection[int]

    def of(self, tokens: Items[int]) -> list[int]:
        """The tokens that are read, in their order; all of a prompt of up to WHOLE. Raises ContextLengthExceeded."""
        count = counted(self.share, tokens, self.drafter)
        if count == len(tokens):
            return [*tokens]
        return [tokens[place] for place in most_wanted(looked_at(self.drafter, tokens), tokens, count, self.always)]


def counted(share: float, tokens: Items[int], drafter: TreeLM) -> int:
    """How many tokens of a prompt that is. Raises ContextLengthExceeded where the drafter cannot choose so many."""
    count = max(round(share * len(tokens)), WHOLE)
    if count < len(tokens) > drafter.context:
        raise ContextLengthExceeded(
            f"the prompt has {len(tokens):,} tokens, the drafter that is to choose among them reads "
            f"{drafter.context:,}.",
            hint="leave --lossy out, or a drafter with a longer context.",
        )
    return min(count, len(tokens))


def most_wanted(
    wanted_R: Tensor, tokens: Items[int], count: int, always: Collection[int], last: int = LOOKING
) -> list[int]:
    """The places of `count` tokens, ascending: the first FIRST, the `last` ones, those of `always`, and of the others
    the most wanted.
    """
    sure_R = torch.tensor([token in always for token in tokens], device=wanted_R.device)
    sure_R[:FIRST] = sure_R[-last:] = True
    best_R = wanted_R.masked_fill(sure_R, float("inf")).sort(descending=True, stable=True).indices
    places: list[int] = best_R[: max(count, int(sure_R.sum()))].sort().values.tolist()
    return places


@torch.no_grad()
def looked_at(
    lm: TreeLM, tokens: Items[int], ahead: int = 0, ends: Collection[int] = (), cache: KVCache | None = None
) -> Tensor:
    """How much the last tokens look at each, float32 [R]: the most of any head, and as much for its neighbours.

    They are joined by up to `ahead` tokens that the model writes behind them, up to one of `ends`. Layers with a window
    do not count; soft caps of scores, which change no order, are left out. `cache` is one of the model's, whose text is
    this one afterwards, and what was written.
    """
    cache = KVCache() if cache is None else cache
    cache.rewind(min(len(cache), len(tokens) - LOOKING))
    if before := tokens[len(cache) : len(tokens) - LOOKING]:
        _read(lm, cache, before)
    cache.queries = {}
    logits_V = _read(lm, cache, tokens[len(cache) :])
    for _ in range(min(ahead, lm.context - len(tokens))):
        if (token := int(logits_V.argmax())) in ends:
            break
        logits_V = _read(lm, cache, [token])
    queries, cache.queries = cache.queries, None
    most_R = torch.zeros(len(tokens), device=lm.device)
    for layer, kind in enumerate(lm.kinds):
        if layer in queries and kind.window is None and kind.chunk is None:
            keys_GRD = cache.layers[layer if kind.keys_of is None else kind.keys_of].keys_HRD[:, : len(cache)]
            weights_HR = _mean_weights(torch.cat(queries[layer], dim=1), keys_GRD)
            most_R = torch.maximum(most_R, weights_HR.amax(0)[: len(tokens)])
    pooled = torch.nn.functional.max_pool1d(most_R[None], 2 * NEIGHBOURS + 1, stride=1, padding=NEIGHBOURS)
    return pooled[0]


def _read(lm: TreeLM, cache: KVCache, tokens: Items[int]) -> Tensor:
    """What follows these tokens, which become text: logits, float32 [V]."""
    (hidden_RH,) = lm.forward([Rows.text(cache, tokens)])
    cache.commit(range(len(tokens)))
    return lm.head(hidden_RH[-1:])[0]


def _mean_weights(query_HQD: Tensor, keys_GRD: Tensor) -> Tensor:
    """The attention of the last rows to all, [H, R], meaned over them; each sees what is before it."""
    queries, rows = query_HQD.shape[1], keys_GRD.shape[1]
    later_QR = torch.ones(queries, rows, dtype=torch.bool, device=keys_GRD.device).triu(rows - queries + 1)
    found = []
    for own_HQD, keys_RD in zip(query_HQD.float().chunk(len(keys_GRD)), keys_GRD, strict=True):  # scores are large
        scores_HQR = (own_HQD @ keys_RD.float().T).masked_fill_(later_QR, float("-inf"))
        found.append(scores_HQR.softmax(-1).mean(1))
    return torch.cat(found)
