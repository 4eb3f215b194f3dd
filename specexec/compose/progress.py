"""How far loading is: the one object that `load` reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def silent(done: int, of: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class LoadProgress:
    """Called while a model is loaded, each with how many are done and of how many."""

    read: Callable[[int, int], None] = silent
    """Layers that stay in memory and have been read."""
    quantised: Callable[[int, int], None] = silent
    """Layers that draft and have been quantised."""
    searched: Callable[[int, int], None] = silent
    """Sets of sublayers that `skip` has tried; the second number is the most that it will try."""
