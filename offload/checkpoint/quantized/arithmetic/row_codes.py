"""A weight of 8-bit integers that multiplies as it is stored: its linear computes in them. Knows no layer and no file.

Activations become integers of 15 bits, row by row; where the machine multiplies 8 bits alone, each of these two of 8
bits: x = step * (128 * high + low). Products and sums of integers are exact, so a row's result has the same bits
whatever is computed with it. They are rounded once, and scales applied, at the end.   R rows   I inputs   O outputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product as product_of
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offload.checkpoint.quantized.arithmetic.group_codes import GroupCodes
from offload.checkpoint.quantized.arithmetic.pieces import fill_each, runs
from offload.checkpoint.quantized.weight import GPU_PIECE_B
from offload.machine import integer_loops
from offload.machine.integer_products import most_rows_of_loops, product
from offload.machine.thread_pool import share

# As bitsandbytes has it, for scales that are the largest magnitude of a row.
INT8_STEP = 7.874015718698502e-3
HIGH = 128
LARGEST = 127 * HIGH  # of an activation's integers
# Rows without numbers of this size are taken to be this large, for nothing is divided by zero.
SMALLEST = 1e-30
# Of a thread's intermediate results: what stays in the second cache of common CPUs.
PIECE_B = 1 << 20
EXPANDED_B = 1 << 19  # of integers that are made out of fewer bits
SMALL = 1 << 18  # weights that are not worth waking threads for
PARTS = 4  # of a linear for each thread: one that is held up does fewer of them
Make = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class RowCodes(torch.Tensor):
    """A weight [O, I] as int8 codes, whole or in groups, and the largest magnitude of each row.

    `torch.nn.functional.linear` takes it in integers; to every other function it is its dequantised numbers.
    """

    codes_OI: torch.Tensor | GroupCodes
    scales_O: torch.Tensor

    @classmethod
    def of(cls, codes_OI: torch.Tensor | GroupCodes, scales_O: torch.Tensor, dtype: torch.dtype) -> RowCodes:
        """Such a weight, which takes part in arithmetic of `dtype`."""
        made = torch.Tensor._make_wrapper_subclass(cls, codes_OI.shape, dtype=dtype, device=codes_OI.device)
        assert isinstance(made, cls)
        made.codes_OI, made.scales_O = codes_OI, scales_O
        return made

    def dense(self) -> torch.Tensor:
        """The numbers that it stands for, in its dtype."""
        wide = self.codes_OI[:].float().mul_(self.scales_O[:, None]).mul_(INT8_STEP)
        return wide.to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and isinstance(args[1], cls):
            return linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    # torch types it as if it were no class method.
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def fill_integers(codes: Sequence[torch.Tensor | GroupCodes], scales: torch.Tensor, target: torch.Tensor) -> None:
    """Fill a matrix, or a stack of them, with the integers of each times the scales of their rows."""
    O, I = codes[0].shape
    scales_EO, target_EOI = scales.view(-1, O), target.view(-1, O, I)

    def fill(piece: tuple[int, slice]) -> None:
        matrix, rows = piece
        dense = codes[matrix][rows].float()
        target_EOI[matrix, rows].copy_(dense.mul_(scales_EO[matrix, rows, None]).mul_(INT8_STEP))

    fill_each(fill, product_of(range(len(codes)), runs(O, 4 * I, target)), target)


def linear(rows: torch.Tensor, weight: RowCodes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Products [..., O] of [..., I] rows in their dtype, each row's bits its own."""
    R, O = rows.shape[:-1].numel(), weight.shape[0]
    looped = rows.is_cpu and integer_loops.takes(O) and 0 < R <= most_rows_of_loops(torch.get_num_threads())
    return (_by_loops if looped else _by_products)(rows, weight, bias).view(*rows.shape[:-1], O)


def _by_loops(rows: torch.Tensor, weight: RowCodes, bias: torch.Tensor | None) -> torch.Tensor:
    whole_RI, steps_R = _kept(rows, _whole)
    O, I = weight.shape
    found_RO = torch.empty(whole_RI.shape[0], O)
    fill = integer_loops.filling(whole_RI, weight.codes_OI, steps_R, weight.scales_O, found_RO)
    threads = 1 if O * I <= SMALL else torch.get_num_threads()
    step = -(-O // (threads * PARTS)) if threads > 1 else O
    share(lambda start: fill(start, min(start + step, O)), range(0, O, step))
    return (found_RO if bias is None else found_RO.add_(bias)).to(rows.dtype)


def _by_products(rows: torch.Tensor, weight: RowCodes, bias: torch.Tensor | None) -> torch.Tensor:
    codes_OI, scales_O = weight.codes_OI, weight.scales_O
    O, I = codes_OI.shape
    parts_RI, steps_R1 = _kept(rows, halves)
    R = len(steps_R1)
    found_RO = rows.new_empty(R, O)

    def multiply(start: int) -> None:
        outputs = slice(start, start + step)
        high, low = product(parts_RI, codes_OI[outputs]).split(R)
        wide = torch.add(low.long(), high, alpha=HIGH).float().mul_(steps_R1).mul_(scales_O[outputs])
        found_RO[:, outputs] = wide if bias is None else wide.add_(bias[outputs])

    step = _step(R, O, I, isinstance(codes_OI, GroupCodes)) if rows.is_cpu else _gpu_step(R, O, I)
    share(multiply, range(0, O, step))
    return found_RO


def _kept(rows: torch.Tensor, make: Make) -> tuple[torch.Tensor, torch.Tensor]:
    """What is made of [..., I] rows, kept with them until they change: queries, keys, values are made of the same."""
    if rows.is_inference():  # nothing tells whether such a tensor has changed
        return make(rows.reshape(-1, rows.shape[-1]))
    key, made = getattr(rows, "_integers", (None, None))
    if made is None or key != (rows._version, make):
        made = make(rows.reshape(-1, rows.shape[-1]))
        rows._integers = (rows._version, make), made  # type: ignore[attr-defined]  # tensors take any attribute
    return made


def _whole(rows_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in integers of 15 bits, int16 [R, I], and the step of the products of each row, float32 [R]."""
    whole_RI, peaks_R = integer_loops.whole_numbers(rows_RI, LARGEST, SMALLEST)
    return whole_RI, peaks_R.mul_(INT8_STEP / LARGEST)


def halves(rows_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in integers: the high halves [R, I] of all, then the low ones, and the step of each row, float32 [R, 1].

    A step is that of the products: the activation's own times that of the codes.
    """
    R, I = rows_RI.shape
    parts_RI = torch.empty(2 * R, I, dtype=torch.int8, device=rows_RI.device)
    peaks_R1 = torch.empty(R, 1, device=rows_RI.device)
    some = max(1, (PIECE_B if rows_RI.is_cpu else GPU_PIECE_B) // (4 * I))
    for start in range(0, R, some):
        piece = slice(start, min(start + some, R))
        wide = rows_RI[piece].float()
        torch.amax(wide.abs(), 1, keepdim=True, out=peaks_R1[piece]).clamp_(min=SMALLEST)
        whole = (wide * (LARGEST / peaks_R1[piece])).round_()
        high = (whole * (1 / HIGH)).round_()
        parts_RI[piece] = high
        parts_RI[R + piece.start : R + piece.stop] = whole.sub_(high, alpha=HIGH)
    return parts_RI, peaks_R1.mul_(INT8_STEP / LARGEST)


def _step(R: int, O: int, I: int, expands: bool) -> int:
    """Outputs of a block: all of them where they are few, else what a cache holds and every thread has some of."""
    fitting = max(64, min(PIECE_B // (8 * R), EXPANDED_B // I if expands else O))
    threads = 1 if O * I <= SMALL else torch.get_num_threads()
    return min(O, fitting, -(-O // threads))


def _gpu_step(R: int, O: int, I: int) -> int:
    """The same where every operation has to be started: as many as a piece holds of their products and weights."""
    return min(O, max(64, min(GPU_PIECE_B // (8 * R), GPU_PIECE_B // I) // 64 * 64))
