"""Drafting while a sweep streams: what was computed meanwhile, and how much of it the next trees start from."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specexec.planning.budget import RETRY_SWEEPS
from specexec.tree.tree import Ints

if TYPE_CHECKING:
    from specexec.text.sequence import Sequence

FADE = 0.9  # of what was known with every text and sweep
LEAST = 0.01  # of a sweep: for less it is not worth keeping a processor busy


@dataclass
class OverlapGain:
    """How often texts went where the drafter had drafted ahead, and the seconds of drafting that saves."""

    chance: float = 0.25
    draft_s: float = 0.0
    declined: int = 0

    def learn(self, hits: Iterable[bool | None], draft_s: float) -> None:
        """One step: whether each text was met (None: nothing was guessed ahead), and the drafting before the sweep."""
        self.draft_s = FADE * self.draft_s + (1 - FADE) * draft_s if self.draft_s else draft_s
        for hit in hits:
            if hit is not None:
                self.chance = FADE * self.chance + (1 - FADE) * hit

    def pays(self, sweep_s: float) -> bool:
        """Is guessing ahead during such a sweep worth it? Where it was not, it is tried again from time to time."""
        if self.chance * self.draft_s >= LEAST * sweep_s:
            return True
        self.declined += 1
        return self.declined % RETRY_SWEEPS == 0


class SweepOverlap:
    """Begins with the trees as they were submitted; the caller sets `seconds`, those of guessing ahead."""

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
