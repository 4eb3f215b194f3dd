"""Which tokens are too unlikely: top-h, top-k, top-p, min-p, typical-p, epsilon and eta, in the order of `generate`.

The common three are written out, for ties must fall the same way on every machine; the others are transformers' own.
N rows   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from specexec.sampling.params import SamplingParams

FORBIDDEN = float("-inf")


def restrict(logits_NV: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits [N, V] with -inf at every token that a filter forbids; at least one of those allowed before stays.

    Filters see logits / T, as transformers' warpers do; what is returned is not divided by T.
    """
    if not sampling.filtered or not sampling.temperature:
        return logits_NV  # as in `generate`, filters are for sampling only
    scaled_NV = logits_NV / sampling.temperature
    if sampling.top_h:
        scaled_NV = _filtered(theirs.TopHLogitsWarper(sampling.top_h), scaled_NV)
    if sampling.top_k:
        kth_N1 = scaled_NV.topk(min(sampling.top_k, scaled_NV.shape[-1])).values[..., -1:]
        scaled_NV = scaled_NV.masked_fill(scaled_NV < kth_N1, FORBIDDEN)
    if sampling.nucleus < 1:
        ordered = scaled_NV.sort(dim=-1, stable=True)
        tail_NV = ordered.values.softmax(-1).cumsum(-1) <= 1 - sampling.nucleus
        tail_NV[..., -1] = False
        scaled_NV = scaled_NV.masked_fill(tail_NV.scatter(-1, ordered.indices, tail_NV), FORBIDDEN)
    if sampling.min_p:
        probs_NV = scaled_NV.softmax(-1)
        scaled_NV = scaled_NV.masked_fill(probs_NV < sampling.min_p * probs_NV.amax(-1, keepdim=True), FORBIDDEN)
    if sampling.typical_p not in (None, 1):
        scaled_NV = _filtered(theirs.TypicalLogitsWarper(sampling.typical_p), scaled_NV)
    if sampling.epsilon_cutoff and sampling.epsilon_cutoff < 1:
        scaled_NV = _filtered(theirs.EpsilonLogitsWarper(sampling.epsilon_cutoff), scaled_NV)
    if sampling.eta_cutoff and sampling.eta_cutoff < 1:
        scaled_NV = _filtered(theirs.EtaLogitsWarper(sampling.eta_cutoff, device=str(scaled_NV.device)), scaled_NV)
    return logits_NV.masked_fill(scaled_NV == FORBIDDEN, FORBIDDEN)


def _filtered(by: Callable[[torch.LongTensor, Tensor], Tensor], scaled_NV: Tensor) -> Tensor:
    """What transformers' filter leaves; a row that allows nothing, which it cannot read, stays as it is."""
    dead_N1 = (scaled_NV == FORBIDDEN).all(-1, keepdim=True)
    no_ids = torch.LongTensor()  # filters do not look at them
    return by(no_ids, scaled_NV.masked_fill(dead_N1, 0.0)).masked_fill(dead_N1, FORBIDDEN)
