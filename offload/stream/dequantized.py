"""Layers in few bits, or changed by adapters, handed out dense: wraps another stream. Knows no file and no thread.

Resident or on the way, a quantised layer is dequantised when its turn comes, always by the same code, into one piece
of memory on the device where it computes. So all placements compute with the same weights. What computes in integers
is handed out as its codes. What adapters add is added afterwards, at each turn or, where a whole weight stays, once.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from offload.checkpoint.block import Block
from offload.checkpoint.layout import Checkpoint
from offload.checkpoint.routing import Routing
from offload.stream.products import with_products
from offload.stream.protocol import Stream, StreamStats


class DenseLayers:
    """A `Stream` whose layers are ordinary tensors of the compute dtype; only one layer is dense at a time."""

    def __init__(
        self, stream: Stream, checkpoint: Checkpoint, device: torch.device, in_place: Collection[int] = ()
    ) -> None:
        self._stream = stream
        self._in_place = in_place  # layers that have their products where they are whole
        self._blocks = checkpoint.layers
        # One device does one thing after another: the next layer is dequantised after this one has computed.
        self._scratch = torch.empty(checkpoint.dense_B, dtype=torch.uint8, device=device)
        self._taken: tuple[Block, Mapping[str, torch.Tensor]] | None = None
        self._ready: set[int] = set()  # experts of the layer that computes that are dequantised

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self._stream.layers

    @property
    def position(self) -> int | None:
        """The layer that computes now."""
        return self._stream.position

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep: codes and scales."""
        return self._stream.bytes_per_sweep

    def share(self, rows: ArrayLike) -> NDArray[np.float64]:
        """The part of it that a sweep over so many rows is expected to bring."""
        return self._stream.share(rows)

    def stats(self) -> StreamStats:
        """What was done so far."""
        return self._stream.stats()

    @property
    def routing(self) -> Routing:
        """Where its layers send rows to."""
        return self._stream.routing

    def stays(self, layer: int) -> bool:
        """Does the layer never travel?"""
        return self._stream.stays(layer)

    def expect(self, likely: Mapping[int, Sequence[int]]) -> None:
        """Of these layers the sweep probably visits these experts."""
        self._stream.expect(likely)

    def take(self, layer: int, rows: int | None = None) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, dequantised but for experts that have to be fetched; valid until `give`."""
        tensors, block = self._stream.take(layer, rows), self._blocks[layer]
        self._taken, self._ready = (block, tensors), set()
        try:
            whose = None if rows is None or block.routing is None else [None]
            dense = block.dense(tensors, self._scratch, whose)
            if not block.sums:
                return dense
            whole = {one.name for one in block.sums} - {item.name for item in block.packed}
            return with_products(block, dense, whole if layer in self._in_place else ())
        except BaseException:
            self._stream.give()
            raise

    def fetch(self, experts: Collection[int]) -> None:
        """Dequantise these experts of the layer that computes, unless they are."""
        self._stream.fetch(experts)
        assert self._taken is not None
        block, tensors = self._taken
        if wanted := {*experts} - self._ready:
            block.dense(tensors, self._scratch, wanted)
            self._ready |= wanted

    def give(self) -> None:
        """The layer has computed."""
        self._taken = None
        self._stream.give()

    def unwaited(self) -> AbstractContextManager[None]:
        """No thread waits for a layer meanwhile."""
        return self._stream.unwaited()

    def close(self) -> None:
        """Stop; nothing can be taken afterwards."""
        self._stream.close()
