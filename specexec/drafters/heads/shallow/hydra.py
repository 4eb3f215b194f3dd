"""Hydra (Ankner et al. 2024): as Medusa, but its networks know the tokens in between. Hydra++ has a layer in front.

Network k reads x = [h ; E t_1 ; … ; E t_k] of the state and the k tokens behind it: x <- R x + c + silu(W x + b), then
x <- x + silu(W x + b) once for each further block; logits V x + d. In Hydra++ h is what a layer of the target's kind
that attends to the states of the whole text, and a norm, make of the target's state (prefix.py).
N rows   H hidden size   F = (K + 1) H   K tokens of a path   V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.shallow.fields import ShallowFields
from specexec.drafters.heads.shallow.medusa import Residual


class Reducing(nn.Module):
    """R x + c + silu(W x + b), of several rows side by side to one."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.linear, self.res_connection = (nn.Linear(inputs, size) for _ in range(2))

    def forward(self, rows_NF: Tensor) -> Tensor:
        found_NH: Tensor = self.res_connection(rows_NF) + silu(self.linear(rows_NF))
        return found_NH


class Hydra(nn.Module):
    """The networks of a head, under the names of fields.py."""

    follows = True

    def __init__(self, fields: ShallowFields, names: Collection[str], target: TargetSizes) -> None:
        super().__init__()
        size, places = fields.hidden, range(fields.places)
        self.residuals = nn.ModuleList(
            nn.Sequential(Reducing((place + 2) * size, size), *(Residual(size) for _ in range(1, fields.blocks)))
            for place in places
        )
        self.out = nn.ModuleList(nn.Linear(size, fields.vocabulary, f"out.{place}.bias" in names) for place in places)
        self._embedded = target.embedded

    def forward(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        """Logits [N, V] behind paths of K tokens."""
        place = tokens_NK.shape[1] - 1
        read_NF = torch.cat([states_NH, self._embedded(tokens_NK).flatten(1).to(states_NH)], -1)
        logits_NV: Tensor = self.out[place](self.residuals[place](read_NF))
        return logits_NV
