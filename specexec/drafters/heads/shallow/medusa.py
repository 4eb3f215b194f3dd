"""Medusa (Cai et al. 2024): each of its networks guesses one of the next tokens, whatever the others guess.

Network k, for the token behind k others that follow the state h: x <- x + silu(W x + b) from x = h, once for each
block; logits V x.    N rows   H hidden size   K tokens of a path   V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.functional import silu

from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.shallow.fields import ShallowFields


class Residual(nn.Module):
    """x + silu(W x + b)."""

    def __init__(self, size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias)

    def forward(self, rows_NH: Tensor) -> Tensor:
        return rows_NH + silu(self.linear(rows_NH))


class Medusa(nn.Module):
    """The networks of a head, under the names of fields.py."""

    follows = False

    def __init__(self, fields: ShallowFields, names: Collection[str], _: TargetSizes) -> None:
        super().__init__()
        bias, places = "residuals.0.0.linear.bias" in names, range(fields.places)
        self.residuals = nn.ModuleList(
            nn.Sequential(*(Residual(fields.hidden, bias) for _ in range(fields.blocks))) for _ in places
        )
        self.out = nn.ModuleList(nn.Linear(fields.hidden, fields.vocabulary, bias=False) for _ in places)

    def forward(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        """Logits [N, V] behind paths of K tokens, whichever they are."""
        place = tokens_NK.shape[1] - 1
        logits_NV: Tensor = self.out[place](self.residuals[place](states_NH))
        return logits_NV
