"""Codes times the scales of their blocks: (code - zero) * scale in float32, rounded once. Knows no format.

One path for every format whose scales lie in a grid over the weight.   O rows   I columns   G blocks of a row
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from offload.checkpoint.quantized.arithmetic.pieces import fill_each, runs

Values = Callable[[slice], torch.Tensor]


def fill_blocks(
    target_OI: torch.Tensor,
    values: Values,
    scales: torch.Tensor,
    block: tuple[int, int],
    zeros: torch.Tensor | Values | None = None,
    order_I: torch.Tensor | None = None,
    step: int = 1,
) -> None:
    """Fill `target_OI` from `values(rows)`, new float32 tensors [rows, I]; scales and zeros have a number a block.

    `zeros` that are packed too come from `zeros(rows)` [rows, G]. `order_I` says which column of the grid each value's
    numbers are in, where these are not in order; negative numbers (of an order that was never filled) mean that they
    are. `step`: how many rows come at once, at least.
    """
    I = target_OI.shape[1]
    height, width = block
    if order_I is not None:
        in_order = torch.arange(I, device=order_I.device) // width
        order_I, width = torch.where(order_I < 0, in_order, order_I.long()), 1

    def own(grid: torch.Tensor | Values, rows: slice) -> torch.Tensor:
        if isinstance(grid, torch.Tensor):
            chosen = torch.arange(rows.start, rows.stop, device=grid.device) // height
            numbers = grid.index_select(0, chosen).float()
        else:
            numbers = grid(rows).float()
        return numbers if order_I is None else numbers.index_select(1, order_I)

    def fill(rows: slice) -> torch.Tensor:
        wide = values(rows)
        for grid, change in ((zeros, torch.Tensor.sub_), (scales, torch.Tensor.mul_)):
            if grid is not None:
                _for_each_block(wide, own(grid, rows), width, change)
        return wide

    fill_rows(target_OI, fill, step)


def fill_rows(target_OI: torch.Tensor, values: Values, step: int = 1) -> None:
    """Fill `target_OI` from `values(rows)`, float32 tensors [rows, I]; `step`: how many rows come at once, at least."""
    O, I = target_OI.shape
    fill_each(lambda rows: target_OI[rows].copy_(values(rows)), runs(O, 4 * I, target_OI, step), target_OI)


def fill_stack(
    target: torch.Tensor,
    codes_E: torch.Tensor,
    values: Callable[[torch.Tensor], torch.Tensor],
    scales_E: torch.Tensor,
    block: tuple[int, int],
    order_I: torch.Tensor | None = None,
) -> None:
    """Fill a matrix, or each of a stack, from `values(codes)` of some rows of it; one grid of scales may serve all."""
    for index, target_OI in enumerate(target.view(-1, *target.shape[-2:])):
        grid = scales_E[index if len(scales_E) > 1 else 0]
        fill_blocks(target_OI, partial(_values_of, values, codes_E[index]), grid, block, order_I=order_I)


def _values_of(values: Callable[[torch.Tensor], torch.Tensor], codes: torch.Tensor, rows: slice) -> torch.Tensor:
    return values(codes[rows])


def _for_each_block(
    values: torch.Tensor,
    numbers: torch.Tensor,
    width: int,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Change values [R, I] in place by the number of each block of `width` columns; the last one may be narrower."""
    full = values.shape[1] // width
    if full:
        change(values[:, : full * width].unflatten(1, (full, width)), numbers[:, :full, None])
    if full * width < values.shape[1]:
        change(values[:, full * width :], numbers[:, full:])


def by_table(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What a table has for each code of a uint8 tensor: much faster than torch's own conversions on a CPU."""
    return table.index_select(0, codes.reshape(-1).int()).view(*codes.shape, *table.shape[1:])


def of_outputs(words_GW: torch.Tensor, bits: int) -> Values:
    """What gives the codes of some outputs, [rows, G], from words in which those of neighbouring outputs follow.

    The first row must be a multiple of `outputs_apart`.
    """

    def codes(rows: slice) -> torch.Tensor:
        some = words_GW[:, rows.start * bits // 32 : -(-rows.stop * bits // 32)]
        return unpacked(some, bits, rows.stop - rows.start).t()

    return codes


def outputs_apart(bits: int) -> int:
    """After so many outputs a word of 32 bits begins with a code."""
    return 32 // math.gcd(32, bits)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row, uint8 [R, count]: `bits` each, one after another from a row's lowest bit on.

    `words` [R, W] of integers of any width.
    """
    if words.stride(-1) != 1:  # torch calls a row of one word contiguous, whatever its step
        words = words.clone(memory_format=torch.contiguous_format)
    packed = words.view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
    first = torch.arange(count, device=packed.device) * bits
    at, shift = first // 8, (first % 8).int()
    low = packed.index_select(1, at).int()
    high = packed.index_select(1, (at + 1).clamp_(max=packed.shape[1] - 1)).int()
    return (((low | (high << 8)) >> shift) & (2**bits - 1)).to(torch.uint8)
