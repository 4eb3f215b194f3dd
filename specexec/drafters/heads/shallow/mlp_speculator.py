"""IBM's MLP speculators (Wertheimer et al. 2024): a state that moves on with each token, through one stage for each.

s_0 = h, or h / (sqrt(2) rms(h)); s_k = gelu(ln_k(proj_k s_{k-1} + (e / w) emb_k t_k)), logits head_k s_k, with
w = 0.5^(0.5 / n), e = sqrt((1 - w²) inner / 2) for n stages, ln x = weight x / rms(x) + bias.
N rows   H hidden size   I inner size   K tokens of a path   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.shallow.fields import ShallowFields

EPS = 1e-6


class ShiftedNorm(nn.Module):
    """weight x / rms(x) + bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(size)) for _ in range(2))

    def forward(self, rows_NI: Tensor) -> Tensor:
        return _normed(rows_NI) * self.weight + self.bias


class MlpSpeculator(nn.Module):
    """The stages of a speculator. Where they are `tied`, the last of each part stands for all that follow."""

    follows = True

    def __init__(self, fields: ShallowFields, _: Collection[str], __: TargetSizes) -> None:
        super().__init__()
        inner, tokens = fields.inner, fields.vocabulary
        own = 1 if fields.tied else fields.places
        first, later = (
            nn.Linear(fields.hidden, inner, bias=False),
            min(1, fields.places - 1) if fields.tied else own - 1,
        )
        self.proj = nn.ModuleList([first, *(nn.Linear(inner, inner, bias=False) for _ in range(later))])
        self.emb = nn.ModuleList(nn.Embedding(tokens, inner) for _ in range(own))
        self.ln = nn.ModuleList(ShiftedNorm(inner) for _ in range(own))
        self.head = nn.ModuleList(nn.Linear(inner, tokens, bias=False) for _ in range(own))
        share = 0.5 ** (0.5 / fields.places)
        self._of_token = math.sqrt((1 - share**2) * inner / 2) / share
        self._scaled = fields.scaled

    def forward(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        """Logits [N, V] behind paths of K tokens."""
        state_NI = _normed(states_NH) / math.sqrt(2) if self._scaled else states_NH
        for stage, tokens_N in enumerate(tokens_NK.unbind(1)):
            read_NI = _at(self.emb, stage)(tokens_N) * self._of_token
            state_NI = gelu(_at(self.ln, stage)(_at(self.proj, stage)(state_NI) + read_NI))
        logits_NV: Tensor = _at(self.head, tokens_NK.shape[1] - 1)(state_NI)
        return logits_NV


def _at(stages: nn.ModuleList, stage: int) -> nn.Module:
    return stages[min(stage, len(stages) - 1)]


def _normed(rows: Tensor) -> Tensor:
    return rows * (rows.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
