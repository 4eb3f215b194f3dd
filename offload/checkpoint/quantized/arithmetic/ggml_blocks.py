"""Blocks of ggml's types as float32 values, by the same sums and products in the same order as ggml's reference.

A code lies in one or two planes of bits. A plane holds `bits` of each item in runs of bytes: the lowest bits of a run's
bytes belong to its first items, the next bits of the same bytes to the items after those, and so on. A value is its
code, or what a table has for it, times the scale of its group, less another number of the group.
Sources: ggml's `dequantize_row_*` (ggml-quants.c), checked bit by bit with gguf-py.   N blocks   G groups of a block
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from offload.checkpoint.gguf.ggml_types import BY_NAME
from offload.checkpoint.quantized.arithmetic.compiled import compiled, fill_groups
from offload.checkpoint.quantized.arithmetic.pieces import fill_each, piece_B, runs

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Numbers = Callable[[torch.Tensor], torch.Tensor]
# A CPU computes the scales of so many pieces at once: operations on those of one take longer than its values.
SCALED_TOGETHER = 8


def fill_rows(kind: str, codes: torch.Tensor, target: torch.Tensor, undo: str | None = None) -> None:
    """Fill `target` from `codes` [rows, bytes or items of a row]; it may be spread, and have other dimensions.

    `undo`: what the converter did to the values; `plus1` added one, `log` made them -exp(value).
    """
    target = target if target.dim() > 1 else target[None]
    codes = codes.reshape(-1, codes.shape[-1])
    rows = target.shape[0]
    if len(codes) % rows:  # a tensor of single numbers
        codes = codes.reshape(rows, -1)
    rows_each = len(codes) // rows
    if target.dim() > 2 and rows_each * codes.shape[1] > piece_B(target):
        for index in range(rows):
            fill_rows(kind, codes[index * rows_each : (index + 1) * rows_each], target[index], undo)
        return

    def fill(run: slice) -> None:
        find = _values(kind, codes[run.start * rows_each : run.stop * rows_each])
        for rows in runs(run.stop - run.start, row_B, target):
            values = find(slice(rows.start * rows_each, rows.stop * rows_each))
            if undo == "plus1":
                values = values - 1.0
            elif undo == "log":
                values = torch.log(-values)
            dense = target[run][rows]
            dense.copy_(values.view(dense.shape))

    row_B = target[0].numel() * 4
    fill_each(fill, runs(rows, row_B // (SCALED_TOGETHER if target.is_cpu else 1), target), target)


def _values(kind: str, codes: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """What gives the float32 values of some of these rows."""
    if kind in FLOATS:
        return lambda rows: codes[rows].float()
    one, layout = BY_NAME[kind], LAYOUTS[kind]
    blocks, each = codes.reshape(-1, one.nbytes), codes.shape[1] // one.nbytes
    scales = layout.scales(blocks)
    less = torch.zeros_like(scales) if layout.less is None else layout.less(blocks)
    loop = compiled(fill_groups) if blocks.is_cpu and layout.scattered is None else None
    low, high = layout.planes[0], layout.planes[-1]
    planes = (low.at, low.bits, low.run), (high.at, high.bits if len(layout.planes) > 1 else 0, high.run)
    table = np.array(layout.table, dtype=np.float32)

    def find(rows: slice) -> torch.Tensor:
        some = slice(rows.start * each, rows.stop * each)
        if loop is None:
            return _by_torch(layout, blocks[some], one.items, scales[some], less[some])
        values = torch.empty(some.stop - some.start, one.items)
        given = (one_.numpy() for one_ in (scales[some], less[some], values))
        loop(blocks[some].numpy(), *planes, layout.flip, layout.zero, table, *given)
        return values

    return find


@dataclass(frozen=True)
class Plane:
    """`bits` of each item, from byte `at` of a block on, in runs of so many bytes."""

    at: int
    bits: int
    run: int


@dataclass(frozen=True)
class Layout:
    """How a type's blocks become values.

    `planes`: the lowest bits first. A code means (code ^ flip) - zero, or what `table` has for it. `scales` and `less`
    [N, G] of groups of items of one size. `scattered`: a further bit of each item, in no plane, [N, items].
    """

    planes: tuple[Plane, ...]
    scales: Numbers
    less: Numbers | None = None
    zero: int = 0
    flip: int = 0
    table: tuple[int, ...] = ()
    scattered: Numbers | None = None


def _by_torch(
    layout: Layout, blocks: torch.Tensor, items: int, scales: torch.Tensor, less: torch.Tensor
) -> torch.Tensor:
    codes, bits = _codes(blocks, layout.planes[0], items), layout.planes[0].bits
    for plane in layout.planes[1:]:
        codes = codes | (_codes(blocks, plane, items) << bits)
    if layout.scattered is not None:
        codes = codes | (layout.scattered(blocks) << bits)
    values = _table(layout, blocks.device).index_select(0, codes.view(-1).int())
    return values.view(*scales.shape, -1).mul_(scales[..., None]).sub_(less[..., None]).view(len(blocks), items)


def _codes(blocks: torch.Tensor, plane: Plane, items: int) -> torch.Tensor:
    """One plane's bits of every item, [N, items]."""
    packed = blocks[:, plane.at : plane.at + items * plane.bits // 8].reshape(len(blocks), -1, 1, plane.run)
    shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=blocks.device)
    return ((packed >> shifts[:, None]) & (2**plane.bits - 1)).view(len(blocks), items)


def _table(layout: Layout, device: torch.device) -> torch.Tensor:
    """The value of every code a byte can hold, as float32."""
    if layout.table:
        return torch.tensor(layout.table, dtype=torch.float32, device=device)
    return ((torch.arange(256, device=device) ^ layout.flip) - layout.zero).float()


def _half(start: int) -> Numbers:
    """The float16 at a place of each block, as float32 [N, 1]."""
    return lambda blocks: blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _minus_half(start: int) -> Numbers:
    return lambda blocks: -_half(start)(blocks)


def _fifth_bits(start: int) -> Numbers:
    """Bit i of four bytes is that of item i."""

    def bits(blocks: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        return ((blocks[:, start : start + 4, None] >> shifts) & 1).view(-1, 32)

    return bits


def _q3_k_scales(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, None, 104:108] >> shifts[:, None]) & 3).view(-1, 16) << 4
    low = torch.cat((blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4), dim=1)
    return _half(108)(blocks) * (low | high).float().sub_(32)


def _six_bit_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Eight scales of six bits each, of the twelve bytes that hold them and eight minima."""
    first, rest = blocks[:, 4:8], blocks[:, 12:16]
    return _half(0)(blocks) * torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1).float()


def _six_bit_minima(blocks: torch.Tensor) -> torch.Tensor:
    second, rest = blocks[:, 8:12], blocks[:, 12:16]
    return _half(2)(blocks) * torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1).float()


def _iq4_xs_scales(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).view(-1, 8)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).view(-1, 8)
    return _half(0)(blocks) * (low | (high << 4)).float().sub_(32)


def _powers(blocks: torch.Tensor) -> torch.Tensor:
    """Half of two to the power of the first byte, as ggml has it; the lowest two are numbers without a leading bit."""
    powers = blocks[:, :1].int()
    return torch.where(powers < 2, (powers + 1) << 21, (powers - 1) << 23).view(torch.float32)


# The values of IQ4's codes, and twice those of FP4 (E2M1).
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TWICE_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
LAYOUTS = {
    "Q4_0": Layout((Plane(2, 4, 16),), _half(0), zero=8),
    "Q4_1": Layout((Plane(4, 4, 16),), _half(0), _minus_half(2)),
    "Q5_0": Layout((Plane(6, 4, 16),), _half(0), zero=16, scattered=_fifth_bits(2)),
    "Q5_1": Layout((Plane(8, 4, 16),), _half(0), _minus_half(2), scattered=_fifth_bits(4)),
    "Q8_0": Layout((Plane(2, 8, 32),), _half(0), zero=128, flip=128),  # signed
    "Q2_K": Layout(
        (Plane(16, 2, 32),),
        lambda blocks: _half(80)(blocks) * (blocks[:, :16] & 15).float(),
        lambda blocks: _half(82)(blocks) * (blocks[:, :16] >> 4).float(),
    ),
    "Q3_K": Layout((Plane(32, 2, 32), Plane(0, 1, 32)), _q3_k_scales, zero=4),
    "Q4_K": Layout((Plane(16, 4, 32),), _six_bit_scales, _six_bit_minima),
    "Q5_K": Layout((Plane(48, 4, 32), Plane(16, 1, 32)), _six_bit_scales, _six_bit_minima),
    "Q6_K": Layout(
        (Plane(0, 4, 64), Plane(128, 2, 32)),
        lambda blocks: _half(208)(blocks) * blocks[:, 192:208].view(torch.int8).float(),
        zero=32,
    ),
    "IQ4_NL": Layout((Plane(2, 4, 16),), _half(0), table=NONLINEAR),
    "IQ4_XS": Layout((Plane(8, 4, 16),), _iq4_xs_scales, table=NONLINEAR),
    "MXFP4": Layout((Plane(1, 4, 16),), _powers, table=TWICE_FP4),
}
