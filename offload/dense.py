"""Layers that travel in few bits, handed out dense: the stream in front of the stream. Knows no file and no thread.

Resident or on the way, a quantised layer is dequantised when its turn comes, always by the same code, into one piece
of memory on the device where it computes. So all placements compute with the same weights.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from offload.checkpoint import Checkpoint
from offload.stream import Stream, StreamStats


class DenseLayers:
    """A `Stream` whose layers are ordinary tensors of the compute dtype; only one layer is dense at a time."""

    def __init__(self, stream: Stream, checkpoint: Checkpoint, device: torch.device) -> None:
        self._stream = stream
        self._blocks = checkpoint.layers
        # One device does one thing after another: the next layer is dequantised after this one has computed.
        self._scratch = torch.empty(checkpoint.dense_B, dtype=torch.uint8, device=device)

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

    def stats(self) -> StreamStats:
        """What was done so far."""
        return self._stream.stats()

    def take(self, layer: int) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, dequantised; valid until `give` or the next `take`."""
        tensors = self._stream.take(layer)
        try:
            return self._blocks[layer].dense(tensors, self._scratch)
        except BaseException:
            self._stream.give()
            raise

    def give(self) -> None:
        """The layer has computed."""
        self._stream.give()

    def unwaited(self) -> AbstractContextManager[None]:
        """Nobody waits for a layer meanwhile."""
        return self._stream.unwaited()

    def close(self) -> None:
        """Stop; nothing can be taken afterwards."""
        self._stream.close()
