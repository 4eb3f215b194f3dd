"""What scripts that measure share: seconds of a piece of work, plain reads of a model's files, spreads in words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

from offload.machine.files import Files, Range
from offload.placement.forecast import Ceilings, Work, forecast
from offload.placement.placement import Placement
from offload.stream.store import Arena

SPAN_B = 128 << 20
TILE = 16  # the engine never runs fewer rows


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def best_s(work: Callable[[], object], turns: int, clock_s: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the quickest of some turns."""
    found = []
    for _ in range(turns):
        started_s = clock_s()
        work()
        found.append(clock_s() - started_s)
    return min(found)


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def ratios(above: list[float], below: list[float]) -> str:
    """Spread of the ratio within each round."""
    return spread([one / other for one, other in zip(above, below, strict=False)])


def read_plainly(files: Files, arena: Arena, sizes_B: Mapping[Path, int], wanted_B: int) -> None:
    """So many bytes of the model's files into `arena` (SPAN_B bytes), over and over, without a pause between them."""
    ranges: list[Range] = []
    left_B = wanted_B
    while left_B:
        for file, size_B in sizes_B.items():
            for offset in range(0, size_B, SPAN_B):
                if length_B := min(SPAN_B, size_B - offset, left_B):
                    ranges.append(Range(file, offset, (arena.bytes[:length_B],)))
                    left_B -= length_B
    files.read(ranges, "floor")


def drop_cache(files: Iterable[Path]) -> None:
    """Let the system forget the pages of these files; needs no rights, unlike drop_caches."""
    for file in files:
        with file.open("rb") as cached:
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def knee(placement: Placement, work: Work, limits: Ceilings) -> int:
    """The rows, in whole tiles, at which arithmetic is predicted to take as long as the disk."""
    rows = TILE
    while forecast(placement, work, limits, rows + TILE).bound == "disk" and rows < 1024:
        rows += TILE
    return rows
