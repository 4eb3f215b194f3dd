"""The streaming layers of one loaded model, as its callers see them. Knows no module and no file."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offload.model.likely_experts import LikelyExperts
from offload.placement.placement import Placement
from offload.stream.protocol import Stream, StreamStats


@dataclass(frozen=True)
class ModelStream:
    """A model's streaming layers: where they live, what they did, which one computes."""

    placement: Placement
    stream: Stream
    in_integers: bool = False
    """Every matrix of every layer: so a row's bits do not depend on how many rows there are."""
    likely: LikelyExperts = field(default_factory=LikelyExperts)
    """Where rows of tokens went."""

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self.stream.layers

    @property
    def position(self) -> int | None:
        """The layer that computes now."""
        return self.stream.position

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep over many rows; zero for a resident model."""
        return self.stream.bytes_per_sweep

    def share(self, rows: ArrayLike) -> NDArray[np.float64]:
        """The part of it that a sweep over so many rows is expected to bring; less than one among experts only."""
        return self.stream.share(rows)

    def stats(self) -> StreamStats:
        """What was done so far."""
        return self.stream.stats()

    def unwaited(self) -> AbstractContextManager[None]:
        """While this is open a sweep does not wait for weights but fails at once; the next one begins anew."""
        return self.stream.unwaited()

    def close(self) -> None:
        """Stop reading and close the files; the model cannot compute afterwards unless it is resident."""
        self.stream.close()
