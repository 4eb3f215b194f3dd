"""Every layer in memory for good: the stream that has nothing to wait for. Same interface, zero bytes."""

from collections.abc import Mapping, Sequence

import torch

from offload.stream import StreamStats


class ResidentLayers:
    """Hands out the layers where they lie."""

    bytes_per_sweep = 0

    def __init__(self, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._tensors = list(tensors)
        self._position: int | None = None
        self._taken = 0
        self.layers = len(tensors)

    @property
    def position(self) -> int | None:
        """The layer that computes now."""
        return self._position

    def stats(self) -> StreamStats:
        """Layers that computed; nothing was read for them."""
        return StreamStats(layers_read=self._taken)

    def take(self, layer: int) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`."""
        self._position = layer
        self._taken += 1
        return self._tensors[layer]

    def give(self) -> None:
        """The layer has computed."""
        self._position = None

    def close(self) -> None:
        """Nothing runs, nothing to stop; the weights go when the model goes."""
