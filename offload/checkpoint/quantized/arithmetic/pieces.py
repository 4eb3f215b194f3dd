"""A dense tensor filled piece by piece: by all threads of a CPU, one after another on a GPU. Knows no format."""

from collections.abc import Callable, Iterable, Iterator

import torch

from offload.checkpoint.quantized.weight import GPU_PIECE_B
from offload.machine.thread_pool import Piece, share

# Dequantised values pass through a piece of memory on their way to a CPU's weights: small enough for its second cache,
# and for malloc to hand it out again instead of asking the system for new pages every time.
SLICE_B = 512 << 10


def fill_each(fill: Callable[[Piece], object], pieces: Iterable[Piece], target: torch.Tensor) -> None:
    """Fill every piece of the target; several at a time on a CPU, in the order of its stream on a GPU."""
    if target.is_cpu:
        share(fill, pieces)
        return
    for piece in pieces:
        fill(piece)


def piece_B(target: torch.Tensor) -> int:
    """How much is on its way to the target at a time."""
    return SLICE_B if target.is_cpu else GPU_PIECE_B


def runs(count: int, each_B: int, target: torch.Tensor, least: int = 1) -> Iterator[slice]:
    """Slices of `count` things that take `each_B` bytes each on their way to the target, in multiples of `least`."""
    some = piece_B(target) // each_B
    step = max(least, some - some % least)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
