"""Products of integers, exact: compiled loops, torch's kernel, or short sums in float32, whichever is quick here.

A sum of integers has no order, so all ways give the same bits, and a row's are the same whatever comes along.
R rows   I inputs   O outputs
"""

import time
from collections.abc import Callable
from functools import cache

import torch

from offload.machine import integer_loops
from offload.machine.thread_pool import share

# As many products of two 8-bit integers as float32 adds up exactly: 1024 * 128 * 128 = 2 ** 24.
EXACT_INPUTS = 1024
# cuBLAS takes no fewer rows than 17, and inputs and outputs in eights.
CUDA_ROWS, CUDA_STEP = 32, 8
ANY = 1 << 40  # more rows than there are
TRIED = (64, 16, 1)  # rows over which loops are compared with torch's kernel


def way(device: str) -> str:
    """Which of them is taken on this kind of device, in words."""
    most = most_rows_of_loops(torch.get_num_threads()) if device == "cpu" else 0
    if most == ANY:
        return "by compiled loops"
    kernel = "by torch's integer kernel" if kernel_pays(device) else "exactly, by short sums in float32"
    return f"by compiled loops over up to {most} rows, {kernel} over more" if most else kernel


def product(rows_RI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """`rows @ codes.T` of int8 matrices, exactly, as int32 [R, O]; the inputs may be at most 2 ** 17."""
    cuda_fits = not rows_RI.is_cuda or all(size % CUDA_STEP == 0 for size in codes_OI.shape)
    # With one input torch 2.13 takes the transposed codes for a matrix of other strides, and reads beyond their end.
    if cuda_fits and codes_OI.shape[1] > 1 and kernel_pays(rows_RI.device.type):
        return by_kernel(rows_RI, codes_OI)
    return by_floats(rows_RI, codes_OI)


def by_kernel(rows_RI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """By torch's own integer kernel."""
    missing = max(CUDA_ROWS - len(rows_RI), 0) if rows_RI.is_cuda else 0
    padded_RI = torch.nn.functional.pad(rows_RI, (0, 0, 0, missing)) if missing else rows_RI
    return torch._int_mm(padded_RI, codes_OI.t())[: len(rows_RI)]


def by_floats(rows_RI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """In float32, so few inputs at a time that every sum is exact in it."""
    products_RO = torch.zeros(len(rows_RI), len(codes_OI), dtype=torch.int32, device=rows_RI.device)
    for rows, codes in zip(rows_RI.split(EXACT_INPUTS, 1), codes_OI.split(EXACT_INPUTS, 1), strict=True):
        products_RO += (rows.float() @ codes.float().t()).int()
    return products_RO


@cache
def kernel_pays(device: str) -> bool:
    """Whether torch's kernel is exact on this kind of device and not slower. Tried once, in some ten milliseconds.

    It is not exact on x86 without VNNI, where oneDNN adds pairs of products in 16 bits and cuts off what is larger.
    """
    largest = torch.tensor([127, -127, 127], dtype=torch.int8, device=device)
    codes_OI = largest.repeat(1024 * 1024)[: 1024 * 1024].view(1024, 1024)
    try:
        for count in (1, 2, 8, 32, 100):
            rows_RI = codes_OI[:count]
            if not torch.equal(by_kernel(rows_RI, codes_OI[:64]), by_floats(rows_RI, codes_OI[:64])):
                return False
    except (RuntimeError, NotImplementedError):
        return False  # this torch has none for this device
    rows_RI = codes_OI[:32]
    kernel_s, floats_s = (min(_seconds(way, rows_RI, codes_OI) for _ in range(3)) for way in (by_kernel, by_floats))
    return kernel_s <= floats_s


@cache
def most_rows_of_loops(threads: int) -> int:
    """Over how many rows compiled loops are the quickest way on this CPU, where each of its threads has a part."""
    if not integer_loops.there():
        return 0
    if not kernel_pays("cpu"):
        return ANY
    codes_OI, scales_O = torch.ones(1024, 1024, dtype=torch.int8), torch.ones(1024)
    for rows in TRIED:
        whole_RI, steps_R = torch.ones(rows, 1024, dtype=torch.int16), torch.ones(rows)
        halves_RI, found_RO = codes_OI[: 2 * rows], torch.empty(rows, 1024)

        def loops() -> None:
            integer_loops.filling(whole_RI, codes_OI, steps_R, scales_O, found_RO)(0, 1024)  # noqa: B023

        def kernel() -> None:
            by_kernel(halves_RI, codes_OI)  # noqa: B023

        if _on_all_threads(loops, threads) <= _on_all_threads(kernel, threads):
            return ANY if rows == TRIED[0] else rows
    return 0


def _on_all_threads(way: Callable[[], object], threads: int) -> float:
    """Seconds of the quickest of some runs in which every thread does this once."""

    def run() -> float:
        began_s = time.perf_counter()
        share(lambda _: way(), range(threads))
        return time.perf_counter() - began_s

    return min(run() for _ in range(4))


def _seconds(
    way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows_RI: torch.Tensor, codes_OI: torch.Tensor
) -> float:
    began_s = time.perf_counter()
    way(rows_RI, codes_OI)[0, 0].item()
    return time.perf_counter() - began_s
