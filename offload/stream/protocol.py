"""Where wrapped layers borrow their tensors from, and the statistics of its work."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from offload.checkpoint.routing import Routing


@dataclass(frozen=True)
class StreamStats:
    """What the stream has done so far: layers that computed and their bytes; `dropped_B` was read but not used.

    Of `bytes_read` `wrong_B` are experts that were guessed and then not visited.

    `wait_s`: seconds that computing waited for weights; `read_s`: seconds of the readers, all threads together.
    """

    layers_read: int = 0
    bytes_read: int = 0
    dropped_B: int = 0
    wrong_B: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0


class Stream(Protocol):
    """Layers, one at a time and in any order; what a wrapped layer needs."""

    @property
    def layers(self) -> int:
        """How many layers there are."""

    @property
    def position(self) -> int | None:
        """The layer that computes now."""

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep."""

    def stats(self) -> StreamStats:
        """What was done so far."""

    def share(self, rows: ArrayLike) -> NDArray[np.float64]:
        """The part of it that a sweep over so many rows is expected to bring: fewer rows visit fewer experts."""

    @property
    def routing(self) -> Routing:
        """Where its layers send rows to, as far as they have experts that are fetched."""

    def stays(self, layer: int) -> bool:
        """Does the layer never travel, so that its tensors are good for as long as the stream is?"""

    def expect(self, likely: Mapping[int, Sequence[int]]) -> None:
        """These experts the sweep probably visits, by layer, the likeliest first: they come when nothing else does."""

    def take(self, layer: int, rows: int | None = None) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, valid until `give` or the next `take`; for so many rows but for experts to fetch."""

    def fetch(self, experts: Collection[int]) -> None:
        """Bring these experts of the layer that computes, unless they are there."""

    def give(self) -> None:
        """The layer has computed; its buffer may be filled again."""

    def unwaited(self) -> AbstractContextManager[None]:
        """While this is open no thread waits for a layer: taking one that is not there yet raises ReadFailed."""

    def close(self) -> None:
        """Stop; nothing can be taken afterwards."""
