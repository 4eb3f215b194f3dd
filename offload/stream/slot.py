"""A buffer of the ring: which layer it holds, how much of it has arrived, and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from offload.stream.store import Arena


class State(Enum):
    EMPTY = "empty"
    READY = "ready"
    TAKEN = "taken"


@dataclass
class Slot:
    """One buffer of the ring and what it holds."""

    number: int
    host: Arena | None
    # One assignment moves a slot on, so that a Ctrl-C between two lines can lose none.
    state: State = State.EMPTY
    reading: bool = False
    """A reader writes into it: whatever its state, no other thread may."""
    layer: int | None = None
    """What it holds or will hold; None while it is empty, or filled with a layer that is no longer wanted."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moved_B: int = 0
    missing: frozenset[int] = frozenset()
    """Experts that were not read ahead."""
    wanted: frozenset[int] = frozenset()
    """Those of them that the computation waits for."""
    guessed: frozenset[int] = frozenset()
    """Experts that came before they were asked for, and were not asked for yet."""
    asked: bool = False
    """The computation has said which experts it wants: none is guessed any more."""
    failure: BaseException | None = None
    """Why the layer, or the experts that were wanted last, did not come."""
