"""Products of 15-bit rows with 8-bit codes as compiled loops, for x86 CPUs with AVX2; nothing where numba is missing.

One instruction multiplies 16 pairs of 16-bit integers and adds neighbours in 32 bits, exactly: a row need not be cut
into halves, and codes are read as they are stored, once for every few rows. Each variant is compiled once in a process,
in about a second, when it is first needed.
R rows   I inputs   O outputs   G groups of GROUP inputs
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import torch

# As many products of 15 bits and 8 as an int32 adds up: 1024 * 127 * 128 * 128 < 2 ** 31.
SPAN = 1024
LANES = 16  # integers of 16 bits in a register
GROUP = 32  # inputs that share a step and an origin in codes of 4 bits
FEW, MANY = (1, 8), (4, 2)  # rows and outputs of a tile: what registers hold, for a few rows and for more

Fill = Callable[..., None]


class Groups(Protocol):
    """Codes of 4 bits: uint8 [O, I / 2], of a group those of its first half in the low bits; steps and origins."""

    @property
    def codes_OB(self) -> torch.Tensor: ...
    @property
    def steps_OG(self) -> torch.Tensor: ...
    @property
    def origins_OG(self) -> torch.Tensor: ...


Codes = torch.Tensor | Groups
"""int8 [O, I], or 4 bits."""


@cache
def there() -> bool:
    """Whether these loops are for this CPU and can be compiled."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu.get_capabilities().get("avx2"):
        return False
    try:
        import numba  # noqa: F401 - whether it is there
    except ImportError:
        return False
    return True


def takes(codes_O: int) -> bool:
    """Whether there are enough outputs for a tile."""
    return codes_O >= FEW[1]


def whole_numbers(rows_RI: torch.Tensor, largest: int, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int16 whose largest magnitude is `largest`; what it was, float32 [R], or `smallest` if that is more."""
    wide_RI = rows_RI.float().contiguous()
    whole_RI, peaks_R = torch.empty_like(wide_RI, dtype=torch.int16), wide_RI.new_empty(len(wide_RI))
    _rounding()(*wide_RI.shape, wide_RI.data_ptr(), largest, smallest, whole_RI.data_ptr(), peaks_R.data_ptr())
    return whole_RI, peaks_R


def filling(
    whole_RI: torch.Tensor, codes: Codes, steps_R: torch.Tensor, scales_O: torch.Tensor, found_RO: torch.Tensor
) -> Callable[[int, int], None]:
    """What fills the columns from the first to before the second number of float32 results [R, O].

    With exact sums, rounded, times the step of the row and the scale. There must be as many outputs as a tile has.
    """
    tile = FEW if whole_RI.shape[0] < MANY[0] else MANY
    if isinstance(codes, torch.Tensor):
        stored = (codes, codes[:0], codes[:0])
    else:
        stored = (codes.codes_OB, codes.steps_OG, codes.origins_OG)
    loop = _products(*tile, not isinstance(codes, torch.Tensor))
    arrays = [array.contiguous() for array in (whole_RI, *stored, steps_R, scales_O.float(), found_RO)]
    assert arrays[-1] is found_RO
    addresses, sizes = [array.data_ptr() for array in arrays], (*whole_RI.shape, found_RO.shape[1])

    def fill(first: int, end: int, _: object = arrays) -> None:  # which have to be there meanwhile
        loop(*sizes, *addresses, first, end)

    return fill


@cache
def _rounding() -> Fill:
    from numba import njit
    from numba.np.numpy_support import carray

    from offload.machine.integer_tiles import pointer

    def rounding(R: int, I: int, wide_at: int, largest: float, smallest: float, whole_at: int, peaks_at: int) -> None:
        wide, whole = carray(pointer(wide_at), (R, I), np.float32), carray(pointer(whole_at), (R, I), np.int16)
        peaks = carray(pointer(peaks_at), (R,), np.float32)
        for r in range(R):
            row, peak, number = wide[r], np.float32(smallest), True
            for i in range(len(row)):
                peak = max(peak, abs(row[i]))
                number = number and row[i] == row[i]
            peak = peak if number else np.float32(np.nan)
            peaks[r] = peak
            factor = np.float32(1) / peak * np.float32(largest)  # as torch divides a number by a tensor
            for i in range(len(row)):
                whole[r, i] = np.int16(np.rint(row[i] * factor))

    loop: Fill = njit(nogil=True, error_model="numpy")(rounding)
    return loop


@cache
def _products(rows: int, outputs: int, grouped: bool) -> Fill:
    """The loop over tiles of so many rows and outputs, of codes that are grouped or not."""
    from numba import njit
    from numba.np.numpy_support import carray

    from offload.machine.integer_tiles import expansion, pointer, sums

    tile, expand = sums(rows, outputs, LANES, grouped), expansion(GROUP)
    width = 2 if grouped else 1  # bytes of a code when it is multiplied

    def products(
        R: int, I: int, O: int, whole_at: int, codes_at: int, steps_at: int, origins_at: int, row_steps_at: int,
        scales_at: int, found_at: int, first: int, end: int,
    ) -> None:  # fmt: skip
        whole, codes = carray(pointer(whole_at), (R, I), np.int16), carray(pointer(codes_at), (O, I), np.int8)
        row_steps, scales = (
            carray(pointer(row_steps_at), (R,), np.float32),
            carray(pointer(scales_at), (O,), np.float32),
        )
        found = carray(pointer(found_at), (R, O), np.float32)
        G = I // GROUP
        part, totals = np.empty(rows * outputs, np.int32), np.empty((R, outputs), np.int64)
        expanded = np.empty((outputs, SPAN), np.int16)
        for o in range(first, end, outputs):
            begin = min(o, O - outputs)  # the last tile covers outputs of the one before it again
            totals[:] = 0
            for i in range(0, I, SPAN):
                count = min(SPAN, I - i)
                even = count - count % LANES
                if grouped:
                    for k in range(outputs):
                        group = (begin + k) * G + i // GROUP
                        here = expanded.ctypes.data + 2 * SPAN * k
                        packed = codes_at + group * (GROUP // 2)
                        expand(packed, steps_at + group, origins_at + group, count // GROUP, here)
                    weights, stride = expanded.ctypes.data, SPAN * width
                else:
                    weights, stride = codes_at + begin * I + i, I * width
                for r in range(0, R, rows):
                    top = min(r, R - rows)
                    if even:
                        tile(whole_at + 2 * (top * I + i), 2 * I, weights, stride, even, part.ctypes.data)
                        for m in range(r - top, rows):
                            for k in range(outputs):
                                totals[top + m, k] += part[m * outputs + k]
                if not grouped:
                    for r in range(R):
                        for k in range(outputs):
                            for j in range(i + even, i + count):
                                totals[r, k] += np.int64(whole[r, j]) * np.int64(codes[begin + k, j])
            for r in range(R):
                for k in range(outputs):
                    found[r, begin + k] = np.float32(totals[r, k]) * row_steps[r] * scales[begin + k]

    loop: Fill = njit(nogil=True, error_model="numpy")(products)
    return loop
