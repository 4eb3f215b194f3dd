"""ReDrafter (Zhang et al. 2024): a recurrent network whose state moves on with each token, beside a state that stays.

s_0 = 0, s <- silu(W E t + U s + u), or s + E t where it has no such network; logits V r([h ; s]), where r is a
projection, if sizes differ, and residual blocks as Medusa's.
N rows   H hidden size   K tokens of a path   V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.shallow.fields import ShallowFields
from specexec.drafters.heads.shallow.medusa import Residual


class ReDrafter(nn.Module):
    """The network, under the names of fields.py."""

    follows = True

    def __init__(self, fields: ShallowFields, names: Collection[str], target: TargetSizes) -> None:
        super().__init__()
        size = fields.hidden
        if "rnn_w.weight" in names:
            self.rnn_w, self.rnn_u = nn.Linear(size, size, bias=False), nn.Linear(size, size)
        if fields.inner != 2 * size:
            self.input_proj = nn.Linear(2 * size, fields.inner)
        self.residuals = nn.Sequential(*(Residual(fields.inner) for _ in range(fields.blocks)))
        self.out = nn.Linear(fields.inner, fields.vocabulary, bias=False)
        self._embedded = target.embedded

    def forward(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        """Logits [N, V] behind paths of K tokens."""
        moving_NH = torch.zeros_like(states_NH)
        for read_NH in self._embedded(tokens_NK).to(states_NH).unbind(1):
            if "rnn_w" in self._modules:
                moving_NH = silu(self.rnn_w(read_NH) + self.rnn_u(moving_NH))
            else:
                moving_NH = moving_NH + read_NH
        both = torch.cat([states_NH, moving_NH], -1)
        if "input_proj" in self._modules:
            both = self.input_proj(both)
        logits_NV: Tensor = self.out(self.residuals(both))
        return logits_NV
