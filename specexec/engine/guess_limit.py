"""How many guesses the next step may check: what was asked for, and no more than memory holds for every text."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from typing import Literal

from specexec.drafters.cost import CostModel
from specexec.planning.budget import AutoBudget, Budget, FixedBudget
from specexec.planning.memory_room import Room
from specexec.sizes import MOST_NODES, drafted, drafter_rows
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth

log = logging.getLogger(__name__)


class GuessLimit:
    """`budget` guesses for each text, or as many as pay, within `room`. `target` is the key of its caches."""

    def __init__(self, budget: int | Literal["auto"], room: Room, cost: CostModel, target: object) -> None:
        self.budget = budget
        self.room = room
        self._auto = AutoBudget(cost)
        self._target = target
        self._warned = False

    def share(self, live: Items[Sequence], kept: Items[int] = ()) -> Budget:
        """Let every live text have as many guesses as memory holds; caches give back what is beyond that.

        `kept` are the lengths of texts that take memory beside them.
        """
        most = self.room.most if self.budget == "auto" else self.budget * len(live)
        nodes = self.room.nodes([*(one.longest for one in live), *kept], most)
        for sequence in live:
            self._give_back(sequence, nodes)
        if self.budget == "auto":
            self._auto.most = min(MOST_NODES, nodes * len(live))
            return self._auto
        if nodes < self.budget:
            self._warn(nodes, len(live), self.budget)
        return FixedBudget(min(self.budget, nodes))

    def _give_back(self, sequence: Sequence, nodes: int) -> None:
        sequence.most_nodes = nodes
        if sequence.growth.asked > drafted(nodes):
            sequence.growth = Growth()
            for cache in sequence.caches.values():
                cache.forget_nodes()
        for model, cache in sequence.caches.items():
            cache.give_back(sequence.longest, nodes if model is self._target else drafter_rows(nodes))

    def _warn(self, nodes: int, texts: int, budget: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "memory holds %d guesses for each of %d texts, not %d; alone they have more.", nodes, texts, budget
            )
