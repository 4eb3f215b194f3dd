"""Linears in fixed row tiles, so that a row's result does not depend on how many rows are computed with it.

Matrix kernels pick another order of summation for few rows (1 and 8 rows differ from 16 and more in float32 and bf16
on CPU; from 400 rows on some split differently again; the bits of a single float32 row may depend on where its weights
begin in memory), so rows come in multiples of 16 and at most 256 at a time. That is not enough for bf16 on AMX, where
rows among 48 and more differ from those among 16, nor for float32 with several threads, for which see any_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specexec.sizes import CHUNK

TILE = 16
EVEN = 64  # rows of every product, where its bits may depend on how many there are beyond a tile
# torch's own multiplication of all experts, and the one that transformers takes where torch's cannot be used.
GROUPED = ("_grouped_mm", "grouped_mm_fallback")


def padded(rows: int) -> int:
    """The next multiple of a tile."""
    return -(-rows // TILE) * TILE


def filled_up(rows_R: Tensor, count: int) -> Tensor:
    """So many rows, [R, …]. What fills them up repeats the last row, and so visits no expert of its own."""
    missing = count - len(rows_R)
    return torch.cat([rows_R, rows_R[-1:].expand(missing, *rows_R.shape[1:])]) if missing > 0 else rows_R


def tiled(linear: Callable[[Tensor], Tensor], rows_RI: Tensor, tile: int = TILE, most: int = CHUNK) -> Tensor:
    """`linear` over [R, I] rows in tiles, at most so many rows at a time; returns [R, O]."""
    parts = []
    for chunk in rows_RI.split(most):
        missing = -len(chunk) % tile
        parts.append(linear(nn.functional.pad(chunk, (0, 0, 0, missing)) if missing else chunk)[: len(chunk)])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class RowTiles(TorchFunctionMode):
    """While active, every linear runs in tiles: for models whose experts each see a few rows of their own.

    On a CPU the grouped multiplication of all experts is a loop over them, each with the rows it has: so is this.
    `even`: each product has EVEN rows, no more and no fewer.
    """

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        self._tile, self._most = (EVEN, EVEN) if even else (TILE, CHUNK)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        if getattr(func, "__name__", None) in GROUPED and args[0].device.type == "cpu":
            return self._grouped(args[0], args[1], (kwargs or {})["offs"])
        return func(*args, **(kwargs or {}))

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        plain = type(weight) in (Tensor, nn.Parameter)  # others give a row the same bits beside any other rows
        if not plain or (len(flat) % self._tile == 0 and len(flat) <= self._most):
            return nn.functional.linear(rows, weight, bias)
        found = tiled(lambda part: nn.functional.linear(part, weight, bias), flat, self._tile, self._most)
        return found.reshape(*rows.shape[:-1], -1)

    def _grouped(self, rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
        """Rows up to the first end meet the first expert, and so on; [R, O].

        Experts without rows are not touched, for their weights may not be there; rows after the last end give zeros.
        """
        found_RO = rows_RI.new_zeros(len(rows_RI), weight_EIO.shape[-1])
        start = 0
        for expert, end in enumerate(ends_E.tolist()):
            if start < end:
                found_RO[start:end] = self._linear(rows_RI[start:end], weight_EIO[expert].t())
            start = end
        return found_RO
