"""Linears in fixed row tiles, so that a row's result does not depend on how many rows came along.

Matrix kernels pick another order of summation for few rows (1 and 8 rows differ from 16 and more in float32 and bf16
on CPU; from 400 rows on some split differently again), so rows come in multiples of 16 and at most 256 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specexec.workspace import CHUNK

TILE = 16


def padded(rows: int) -> int:
    """The next multiple of a tile."""
    return -(-rows // TILE) * TILE


def filled_up(rows_R: Tensor) -> Tensor:
    """Whole tiles of rows. What fills the last one repeats the last row, and so visits no expert of its own."""
    return torch.cat([rows_R, rows_R[-1:].expand(padded(len(rows_R)) - len(rows_R))])


def tiled(linear: Callable[[Tensor], Tensor], rows_RI: Tensor) -> Tensor:
    """`linear` over [R, I] rows in tiles; returns [R, O]."""
    parts = []
    for chunk in rows_RI.split(CHUNK):
        missing = padded(len(chunk)) - len(chunk)
        parts.append(linear(nn.functional.pad(chunk, (0, 0, 0, missing)))[: len(chunk)])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class RowTiles(TorchFunctionMode):
    """While active, every linear runs in tiles: for models whose experts each see a few rows of their own."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not nn.functional.linear or args[0].numel() == 0:
            return func(*args, **(kwargs or {}))
        rows, *rest = args
        flat = rows.reshape(-1, rows.shape[-1])
        if len(flat) % TILE == 0 and len(flat) <= CHUNK:
            return func(*args, **(kwargs or {}))
        return tiled(lambda part: func(part, *rest, **(kwargs or {})), flat).reshape(*rows.shape[:-1], -1)
