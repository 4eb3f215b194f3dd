"""How many guesses a sweep carries: a fixed number, or as many as earn their seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from specexec.drafters.cost import CostModel
from specexec.sizes import FIRST_NODES, MOST_NODES
from specexec.tree.tree import Floats

RETRY_SWEEPS = 16  # drafting that does not pay is tried again this often


@dataclass(frozen=True)
class Spent:
    """The sweep in the making: rows it carries without guesses, its sequences, seconds of drafting so far."""

    rows: int
    sequences: int
    drafted_s: float


class Budget(Protocol):
    """Answers two questions about the nodes drafted so far; `chance_N` is their exp(reach), best first."""

    def size(self, chance_N: Floats, spent: Spent) -> int:
        """How many of the best nodes to submit."""
        ...

    def horizon(self, chance_N: Floats, spent: Spent) -> int:
        """Only the best so many nodes are worth asking about."""
        ...

    def worth_asking(self, asked_N: Floats, chance_N: Floats, spent: Spent) -> int:
        """About how many nodes with the chances `asked_N` (best first) to ask the drafter in one more pass."""
        ...


@dataclass(frozen=True)
class FixedBudget:
    """So many nodes for each sequence on average, whatever they cost."""

    nodes: int

    def size(self, chance_N: Floats, spent: Spent) -> int:
        return self.nodes * spent.sequences

    def horizon(self, chance_N: Floats, spent: Spent) -> int:
        return self.size(chance_N, spent)

    def worth_asking(self, asked_N: Floats, chance_N: Floats, spent: Spent) -> int:
        return len(asked_N) if self.nodes else 0


@dataclass
class AutoBudget:
    """The size of most tokens per second, from measured costs."""

    cost: CostModel
    most: int = MOST_NODES
    declined: int = field(default=0, init=False)

    def size(self, chance_N: Floats, spent: Spent) -> int:
        if not self.cost.compute.known:
            return min(FIRST_NODES * spent.sequences, self.most)
        return min(self.cost.best_size(chance_N, spent.rows, spent.sequences, spent.drafted_s), self.most)

    def horizon(self, chance_N: Floats, spent: Spent) -> int:
        # Children of nodes just beyond today's size may still lift it.
        return min(2 * self.size(chance_N, spent) + 16, self.most)

    def worth_asking(self, asked_N: Floats, chance_N: Floats, spent: Spent) -> int:
        asked = self.cost.worth_asking(asked_N, chance_N, spent.rows, spent.sequences, spent.drafted_s)
        if asked or len(chance_N):
            return asked
        self.declined += 1
        return len(asked_N) if self.declined % RETRY_SWEEPS == 0 else 0
