"""Loops that turn packed codes into values, compiled for the CPU by numba where that is installed.

Each is compiled when it is first needed, in about a second, and kept beside this file for processes to come. Where
there is no numba for this Python yet torch does the same, more slowly.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from offload.checkpoint.quantized.int4 import GROUP

Plane = tuple[int, int, int]  # first byte of a block, bits of an item (0 for no plane), bytes of a run


def fill_groups(
    blocks: np.ndarray[Any, Any],
    low: Plane,
    high: Plane,
    flip: int,
    zero: int,
    table: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    less: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
) -> None:
    """values[n, i] = x * scales[n, g] - less[n, g], rounded after each step (float32).

    x is table[code] where there is a table, else (code ^ flip) - zero; a code is the low plane's bits, and above them
    those of the high plane. blocks uint8 [N, bytes], table float32 [16 or 0], scales and less float32 [N, G], values
    float32 [N, items].
    """
    items, groups = values.shape[1], scales.shape[1]
    width = min(items // groups, low[2], high[2])  # items whose bits lie in neighbouring bytes, at one place of each
    runs = items // width
    low_mask, high_mask = np.uint8((1 << low[1]) - 1), np.uint8((1 << high[1]) - 1)
    turned, origin, left = np.uint8(flip), np.float32(zero), np.uint8(low[1])
    group, at, above = np.empty(runs, np.int64), np.empty(runs, np.int64), np.empty(runs, np.int64)
    shift, up = np.empty(runs, np.uint8), np.empty(runs, np.uint8)
    for r in range(runs):
        begin = r * width
        group[r] = begin * groups // items
        span = low[2] * 8 // low[1]
        at[r] = low[0] + begin // span * low[2] + begin % low[2]
        shift[r] = begin % span // low[2] * low[1]
        span = high[2] * 8 // max(high[1], 1)
        above[r] = high[0] + begin // span * high[2] + begin % high[2]
        up[r] = begin % span // high[2] * high[1]
    for n in range(blocks.shape[0]):
        for r in range(runs):
            scale, off = scales[n, group[r]], less[n, group[r]]
            packed, run = blocks[n, at[r] : at[r] + width], values[n, r * width : (r + 1) * width]
            if high[1]:
                upper = blocks[n, above[r] : above[r] + width]
                for j in range(width):
                    code = ((packed[j] >> shift[r]) & low_mask) | (((upper[j] >> up[r]) & high_mask) << left)
                    run[j] = (np.float32(code) - origin) * scale - off
            elif len(table):
                for j in range(width):
                    run[j] = table[(packed[j] >> shift[r]) & low_mask] * scale - off
            else:
                for j in range(width):
                    code = ((packed[j] >> shift[r]) & low_mask) ^ turned
                    run[j] = (np.float32(code) - origin) * scale - off


def expand_groups(
    codes: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    origins: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
) -> None:
    """values[o, i] = code * steps[o, g] + origins[o, g], modulo 256 as int8 has it; all arrays are uint8.

    codes [O, I / 2], of each group of GROUP inputs those of the first half in the low bits; steps and origins [O, G],
    values [O, I].
    """
    half = GROUP // 2
    for o in range(steps.shape[0]):
        for g in range(steps.shape[1]):
            step, origin = steps[o, g], origins[o, g]
            packed = codes[o, g * half : (g + 1) * half]
            low = values[o, g * GROUP : g * GROUP + half]
            high = values[o, g * GROUP + half : (g + 1) * GROUP]
            for j in range(half):
                low[j] = np.uint8((packed[j] & np.uint8(15)) * step + origin)
            for j in range(half):
                high[j] = np.uint8((packed[j] >> np.uint8(4)) * step + origin)


@cache
def compiled(loop: Callable[..., None]) -> Callable[..., None] | None:
    """The loop by numba; None where that cannot be imported."""
    try:
        from numba import njit
    except ImportError:
        return None
    try:
        return njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no folder that can be written
        return njit(nogil=True)(loop)
