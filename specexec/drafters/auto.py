"""`--drafter auto` while it writes: whether its model is worth its time. compose/auto_choice.py chose it before.

Decided by counterfactual: in every sweep that the model drafted for, the union knows how far the cheap members alone
would have come, and how long the model took ("Not a Bandit", 2025, chooses drafters by such full feedback).   M members
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from specexec.drafters.calibration import Calibrated
from specexec.drafters.cost import CostModel
from specexec.drafters.guarded import Guarded
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.union import Union
from specexec.learned import Arrays
from specexec.text.sequence import Sequence
from specexec.tree.tree import Floats, Ints, TokenTree

log = logging.getLogger(__name__)

FADE = 0.95
ENOUGH = 12  # drafted sweeps before anything is decided
CLEARLY = 1.1  # the cheap members alone must be this much faster
REST = 48  # sweeps without the model, then it is tried again


def calibrated(drafter: Drafter) -> Calibrated | None:
    """The first model in it that learns how far its scores may be trusted."""
    inside: Drafter = drafter.union if isinstance(drafter, Auto) else drafter
    members = inside.members if isinstance(inside, Union) else [inside]
    return next((member for member in members if isinstance(member, Calibrated)), None)


def failures(guarded: Guarded) -> dict[str, str]:
    """Why drafters failed last, by name; what a union asks counts for itself."""
    inside = guarded.inside.union if isinstance(guarded.inside, Auto) else guarded.inside
    guards = [guarded, *(inside.guarded if isinstance(inside, Union) else [])]
    return {one.name: one.failure for one in guards if one.failure is not None}


@dataclass
class _Pace:
    """Discounted tokens and seconds of some way to draft."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens = FADE * self.tokens + tokens
        self.seconds = FADE * self.seconds + seconds

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Auto:
    """A union whose first member is a model: it is not asked while the others alone write clearly faster."""

    def __init__(self, union: Union, cost: CostModel) -> None:
        self.name, self.context = union.name, union.context
        self.union, self.cost = union, cost
        self._lengths: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._resting = 0
        self._begin()

    def _begin(self) -> None:
        self._all, self._cheap, self._sweeps = _Pace(), _Pace(), 0

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """As the union has."""
        return self.union.at_hand(asks)

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """As the union does."""
        for ask in asks:
            self._lengths.setdefault(ask.sequence, len(ask.sequence.tokens))
        return self.union.guess(asks, width)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Compare what was confirmed with what would have been without the model; then as the union does."""
        written = sequence.tokens[self._lengths.get(sequence, len(sequence.tokens)) :]
        if len(tree):
            self._weigh(sequence, tree, written)
        self._lengths[sequence] = len(sequence.tokens)
        self.union.observe(sequence, tree, choices_M, kept)

    def pack(self) -> dict[str, Floats]:
        """What the union learned."""
        return self.union.pack()

    def unpack(self, arrays: Arrays) -> None:
        """The way back."""
        self.union.unpack(arrays)

    def _weigh(self, sequence: Sequence, tree: TokenTree, written: Items[int]) -> None:
        drafted_M, self.union.drafted_s = self.union.drafted_s, np.zeros(len(self.union.members))
        if self._resting:
            self._resting -= 1
            if not self._resting:
                self._wake()
            return
        if not self.cost.compute.known:
            return
        named_M = self.union.named(sequence, tree, written)
        # Drafting while the weights stream costs no time: only the seconds beyond that are counted.
        free_s = max(self.cost.idle_s(len(tree) + 1), 0.0)
        sweep_s = float(self.cost.sweep_s(len(tree) + 1.0))
        self._all.add(1 + named_M.max(), sweep_s + max(float(drafted_M.sum()) - free_s, 0.0))
        self._cheap.add(1 + named_M[1:].max(), sweep_s + max(float(drafted_M[1:].sum()) - free_s, 0.0))
        self._sweeps += 1
        if self._sweeps >= ENOUGH and self._cheap.rate > CLEARLY * self._all.rate:
            self._rest()

    def _rest(self) -> None:
        log.info(
            "%s alone would write %.3g tokens/s, with the drafter model %.3g: the model rests for %d sweeps.",
            "+".join(member.name for member in self.union.members[1:]), self._cheap.rate, self._all.rate, REST,
        )  # fmt: skip
        self._resting = REST
        self.union.resting = frozenset({0})

    def _wake(self) -> None:
        self.union.resting = frozenset()
        self._begin()
