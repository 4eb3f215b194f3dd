"""What glibc's malloc does with freed memory, set for the whole process; with another malloc nothing is done.

By itself glibc keeps ever larger pieces for later, and differently sized ones leave holes: up to half as much again as
a sweep needs. What goes back to the system at once has to be asked for anew, page by page, by the next layer. Sweeps
over few rows have the room, as the plan counts the largest one, and take up to a quarter less time (docs/streaming.md).
"""

import ctypes

# glibc's names for how much may lie free at the end of the heap, and from which size on memory is the system's own.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL_B, LARGE_B = 1 << 20, 16 << 20
FEW = 576  # rows of a sweep: 512 guesses, and what 64 texts add

_libc = ctypes.CDLL(None)
_mallopt, _trim = (getattr(_libc, name, None) for name in ("mallopt", "malloc_trim"))


def give_back() -> None:
    """Let freed tensors go back to the system at once."""
    _tell(M_MMAP_THRESHOLD, SMALL_B)
    _tell(M_TRIM_THRESHOLD, 4 * SMALL_B)


def suit(rows: int) -> None:
    """Before a sweep over so many rows: few find what earlier ones freed, many find all of it given back."""
    if rows <= FEW:
        _tell(M_MMAP_THRESHOLD, LARGE_B)
        _tell(M_TRIM_THRESHOLD, 4 * LARGE_B)
        return
    give_back()
    if _trim is not None:
        _trim(0)


def _tell(name: int, value_B: int) -> None:
    if _mallopt is not None:
        _mallopt(name, value_B)
