"""A dense tensor filled piece by piece: by all threads of a CPU, in one go on a GPU. Knows no format."""

from collections.abc import Callable, Iterable, Iterator

import torch

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


def slices(codes: torch.Tensor, each_B: int) -> Iterator[slice]:
    """Slices of the first dimension, of which one index takes `each_B` bytes on its way."""
    step = max(1, SLICE_B // each_B) if codes.is_cpu else codes.shape[0]
    for start in range(0, codes.shape[0], step):
        yield slice(start, start + step)
