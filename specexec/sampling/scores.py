"""What a choice compares: logits with a bias and a grammar, processed, filtered, plus noise.

The order is that of transformers' `generate`, where biases come first and filters last. The choice is then
argmax(logits + T * G) over the allowed tokens (design: one noise, two models). T = 0 needs no special case.
N rows   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from specexec.sampling.filters import FORBIDDEN, restrict
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, processed

if TYPE_CHECKING:
    from specexec.sampling.grammar import Parse
    from specexec.tree.tree import TokenTree

MOST_DECISIVE = 16  # tokens that are looked at one by one: with more of them in doubt, everything is


class NoiseRows(Protocol):
    """Where the noise comes from (noise.py): [P, V] float32 for P positions."""

    def rows(self, positions: Iterable[int]) -> Tensor: ...


def constrained(
    logits_NV: Tensor, sampling: SamplingParams, parse: Parse | None, tree: TokenTree, nodes: Items[int]
) -> Tensor:
    """Logits [N, V] after `nodes` (ROOT = after the text) with the bias, and -inf where the grammar forbids a token."""
    biases = {token: bias for token, bias in sampling.logit_bias if token < logits_NV.shape[-1]}
    if biases:
        logits_NV = logits_NV.clone()
        logits_NV[:, list(biases)] += logits_NV.new_tensor(list(biases.values()))
    if parse is not None:
        allowed_NV = parse.allowed([tree.spelled(node) for node in nodes], logits_NV.shape[-1])
        logits_NV = logits_NV.where(allowed_NV.to(logits_NV.device), FORBIDDEN)
    return logits_NV


def with_noise(logits_NV: Tensor, temperature: float, noise: NoiseRows, positions: Items[int]) -> Tensor:
    """Scores [N, V] whose argmax is the choice: row n gets T * G of positions[n]. At T = 0 no noise is drawn.

    The noise has the target's ids; a drafter's logits may end before.
    """
    if not temperature:
        return logits_NV
    distinct = sorted(set(positions))
    slot = {position: i for i, position in enumerate(distinct)}
    # Added in place: one matrix less of the size of the logits.
    noise_PV = temperature * noise.rows(distinct)[:, : logits_NV.shape[-1]]
    return noise_PV[[slot[position] for position in positions]].add_(logits_NV)


def compared(logits_V: Tensor, sampling: SamplingParams, history: History, noise: NoiseRows, position: int) -> Tensor:
    """What the choice of the token at `position` compares, [V]: constrained logits, processed, filtered, + T * G."""
    allowed_NV = restrict(processed(logits_V.unsqueeze(0), [history]), sampling)
    return with_noise(allowed_NV, sampling.temperature or 0.0, noise, [position])[0]


def at_an_edge(logits_V: Tensor, sampling: SamplingParams, noise: NoiseRows, position: int, unit: float) -> bool:
    """Whether logits that are off by `unit` might let another token win: let in by a filter, or the winner kept out.

    `unit` has the unit of logits; `logits_V` are processed, not filtered.
    """
    heat = sampling.temperature or 0.0
    if not sampling.filtered or not heat:
        return False
    if sampling.rarely_filtered:  # their edges are not worth a formula
        return True
    free_V = with_noise(logits_V.unsqueeze(0), heat, noise, [position])[0]
    allowed_V = restrict(logits_V.unsqueeze(0), sampling)[0].isfinite()
    best = free_V.masked_fill(~allowed_V, FORBIDDEN).max()
    decisive = ((free_V >= best - 2 * unit) & logits_V.isfinite()).nonzero()[:, 0]
    if len(decisive) > MOST_DECISIVE:
        return True
    rows = range(len(decisive))
    inside = []
    for way in (2 * unit, -2 * unit):  # each of them raised or lowered by as much as it may differ from the others
        moved_NV = logits_V.repeat(len(decisive), 1)
        moved_NV[rows, decisive] += way
        top_p, min_p = sampling.nucleus * (1 + way / heat), (sampling.min_p or 0.0) * (1 - way / heat)
        shifted = replace(sampling, top_p=min(max(top_p, 1e-9), 1.0), min_p=min(max(min_p, 0.0), 1.0))
        inside.append(restrict(moved_NV, shifted)[rows, decisive].isfinite())
    return bool((inside[0] != inside[1]).any())
