"""What the drafter was asked about while one sweep streamed, and how much of it the next trees start from."""

from __future__ import annotations

from collections.abc import Sequence as Items

from specexec.sequence import Sequence
from specexec.tree import Ints


class Ahead:
    """Begins with the trees as they were submitted; `seconds` is for whoever guesses on to fill in."""

    def __init__(self, live: Items[Sequence]) -> None:
        self.seconds = 0.0
        self._before = {one: one.growth.expanded_N.copy() for one in live}
        self._asked, self._living = 0, 0

    def settle(self, sequence: Sequence, kept: Ints | None) -> bool:
        """The sweep is over; of this text's nodes only `kept` (from `Growth.below`) live on. It is held no longer.

        Says whether any of them was asked about meanwhile.
        """
        before_N, asked_N = self._before.pop(sequence), sequence.growth.expanded_N.copy()
        asked_N[: len(before_N)] &= ~before_N
        self._asked += int(asked_N.sum())
        living = 0 if kept is None else int(asked_N[kept].sum())
        self._living += living
        return living > 0

    @property
    def used_s(self) -> float:
        """The share of `seconds` that went into nodes which live on."""
        return self.seconds * self._living / self._asked if self._asked else 0.0
