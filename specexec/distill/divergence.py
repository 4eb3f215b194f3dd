"""How far a student is from its target, on what was recorded: the likeliest tokens, and all others as one outcome.

p is the target, q the student, both on N + 1 outcomes: the N likeliest tokens of p, and the rest. By the data
processing inequality each of these is at most what it is on the whole vocabulary, and zero where that is.

forward-kl   sum p log(p / q)                      what training by cross-entropy minimises
reverse-kl   sum q log(q / p)                      prefers being right to covering everything
jsd          half the sum of both to (p + q) / 2   between them (DistillSpec, Zhou et al. 2024)
tv           half sum |p - q|                      1 - the chance that a sampled guess is accepted
tv++         the same by policy gradient, its reward 1[p > q] centred and scaled over the batch (TVD++, Zafrir 2024)

R rows   S tokens that the student names   N likeliest tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Loss: TypeAlias = Literal["forward-kl", "reverse-kl", "jsd", "tv", "tv++"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
TINY = 1e-9


@dataclass(frozen=True)
class Labels:
    """What the target found likeliest at each row: int64 [R, N], rows of the student's head; probabilities [R, N].

    A token that the student cannot name has probability 0.
    """

    ids_RN: Tensor
    probabilities_RN: Tensor

    @classmethod
    def of(cls, top_ids_RN: Tensor, top_log_probs_RN: Tensor, place_V: Tensor) -> Labels:
        """`place_V`: the student's row of each token, -1 where it has none. What it can name sums to 1 again."""
        place_RN = place_V[top_ids_RN.long()]
        known_RN = torch.where(place_RN >= 0, top_log_probs_RN.float().exp(), 0.0)
        unknown_R1 = torch.where(place_RN < 0, top_log_probs_RN.float().exp(), 0.0).sum(-1, keepdim=True)
        return cls(place_RN.clamp(min=0), known_RN / (1 - unknown_R1).clamp(min=TINY))


def divergence(logits_RS: Tensor, labels: Labels, loss: Loss) -> Tensor:
    """Of each row, [R] float32. For tv++ a number whose gradient is meant, and no distance."""
    p_RN, named_RN = labels.probabilities_RN, labels.probabilities_RN > 0
    q_RN = logits_RS.float().softmax(-1).gather(-1, labels.ids_RN) * named_RN
    p_RM, q_RM = _with_rest(p_RN), _with_rest(q_RN)
    if loss == "forward-kl":
        return _kl(p_RM, q_RM)
    if loss == "reverse-kl":
        return _kl(q_RM, p_RM)
    if loss == "jsd":
        middle_RM = (p_RM + q_RM) / 2
        return (_kl(p_RM, middle_RM) + _kl(q_RM, middle_RM)) / 2
    if loss == "tv":
        return (p_RM - q_RM).abs().sum(-1) / 2
    sampled_RM = q_RM.detach()
    reward_RM = (p_RM > sampled_RM).float()
    mean = (sampled_RM * reward_RM).sum() / sampled_RM.sum()
    spread = (sampled_RM * (reward_RM - mean).square()).sum().div(sampled_RM.sum()).sqrt()
    advantage_RM = (reward_RM - mean) / spread.clamp(min=TINY)
    return -(sampled_RM * advantage_RM * q_RM.clamp(min=TINY).log()).sum(-1)


def _with_rest(p_RN: Tensor) -> Tensor:
    return torch.cat([p_RN, (1 - p_RN.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _kl(left_RM: Tensor, right_RM: Tensor) -> Tensor:
    ratio_RM = left_RM.clamp(min=TINY).log() - right_RM.clamp(min=TINY).log()
    return (left_RM * ratio_RM).sum(-1)
