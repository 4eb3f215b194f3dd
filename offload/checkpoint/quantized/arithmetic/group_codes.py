"""8-bit integers stored in 4.5 bits: of every 32 inputs in a row a step, an origin, and codes of 4 bits.

value = origin + step * code, exactly, so whatever computes with 8-bit integers computes with these.
O outputs   I inputs   G = I / 32 groups   B = I / 2 bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.checkpoint.quantized.arithmetic.compiled import compiled, expand_groups
from offload.checkpoint.quantized.int4 import GROUP

LARGEST = 127  # of the integers
CODES = 15  # the largest code
MOST_STEP = 17  # 15 of them are as much as 8 bits hold


@dataclass(frozen=True)
class GroupCodes:
    """An int8 matrix [O, I] stored so; some of its rows are expanded when they are asked for.

    codes_OB: uint8, byte j of a group holds the codes of its inputs j (low half) and j + 16. steps_OG: uint8, 1 … 17.
    origins_OG: int8.
    """

    codes_OB: torch.Tensor
    steps_OG: torch.Tensor
    origins_OG: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        outputs, packed = self.codes_OB.shape
        return torch.Size((outputs, 2 * packed))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes_OB.device

    def __getitem__(self, outputs: slice) -> torch.Tensor:
        """The rows `outputs` as int8 [O, I]."""
        codes_OB, steps_OG = self.codes_OB[outputs], self.steps_OG[outputs]
        origins_OG = self.origins_OG[outputs].view(torch.uint8)
        loop = compiled(expand_groups) if self.codes_OB.is_cpu else None
        if loop is None:
            codes_OGB = codes_OB.unflatten(1, (-1, GROUP // 2))
            codes_OGI = torch.cat([codes_OGB & CODES, codes_OGB >> 4], -1)
            return codes_OGI.mul_(steps_OG[..., None]).add_(origins_OG[..., None]).flatten(1).view(torch.int8)
        values_OI = torch.empty(len(codes_OB), 2 * codes_OB.shape[1], dtype=torch.uint8)
        loop(codes_OB.numpy(), steps_OG.numpy(), origins_OG.numpy(), values_OI.numpy())
        return values_OI.view(torch.int8)


def in_groups(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in GroupCodes' codes, steps and origins, and the largest magnitude of each row, float32 [O].

    Of the smallest step that holds a group and the one below, and of three origins each, the squared error decides.
    """
    scales_O = weight_OI.float().abs().amax(1)
    units_O1 = (scales_O / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    wanted_OGI = (weight_OI.float() / units_O1).unflatten(1, (-1, GROUP))
    lowest, highest = wanted_OGI.amin(-1, keepdim=True), wanted_OGI.amax(-1, keepdim=True)
    holding, middle = ((highest - lowest) / CODES).ceil(), (highest + lowest) / 2
    best: tuple[torch.Tensor, ...] | None = None
    for less in (0, 1):
        step = (holding - less).clamp_(1, MOST_STEP)
        for shift in (-0.5, 0.0, 0.5):
            origin = (middle + (shift - CODES / 2) * step).round_().clamp_(min=-LARGEST)
            origin = torch.minimum(origin, LARGEST - CODES * step)
            code = ((wanted_OGI - origin) / step).round_().clamp_(0, CODES)
            error = (code * step + origin - wanted_OGI).square_().sum(-1, keepdim=True)
            found: tuple[torch.Tensor, ...] = error, step, origin, code
            if best is not None:
                found = tuple(torch.where(error < best[0], *pair) for pair in zip(found, best, strict=True))
            best = found
    assert best is not None
    _, step, origin, code = best
    low, high = code.to(torch.uint8).split(GROUP // 2, -1)
    return (low | high << 4).flatten(1), step[..., 0].to(torch.uint8), origin[..., 0].to(torch.int8), scales_O
