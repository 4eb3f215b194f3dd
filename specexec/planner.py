"""Best-first growth: which guesses are worth a place in the tree.

The best tree of B nodes is the B most probable prefixes. Reach falls along every path, so growing means expanding,
batch by batch, the nodes whose children could still enter the best B (SpecExec 2024, algorithm 1: a parallel Dijkstra).
N nodes   K children of one node
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from specexec.drafters import Ask, Drafter, Guesses
from specexec.ranking import Ranking
from specexec.sequence import Sequence
from specexec.tree import ROOT, Floats, Ints, TokenTree


class Planner(Protocol):
    """Decides the shape of the trees."""

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: int) -> list[TokenTree]:
        """A tree of at most `budget` nodes for every sequence."""
        ...


@dataclass(frozen=True)
class BestFirst:
    """Expand the most probable nodes first, all sequences in one drafter pass, at most `depth` passes.

    `width` children are considered for each node, `beams` nodes expanded for each sequence and pass. `level_decay`
    multiplies reach once a level.
    """

    width: int = 32
    beams: int = 128
    depth: int = 64
    level_decay: float = 1.0

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: int) -> list[TokenTree]:
        """The `budget` most probable prefixes of each sequence, as the drafter sees it."""
        growths = [_Growth(sequence, self._depth(drafter, sequence)) for sequence in live]
        for _ in range(self.depth):
            asks = [ask for growth in growths if (ask := growth.ask(budget, self.beams)).nodes]
            if not asks:
                break
            guesses = drafter.guess(asks, min(self.width, budget))
            for ask, guess in zip(asks, guesses, strict=True):
                next(g for g in growths if g.sequence is ask.sequence).add(ask.nodes, guess, budget, self.level_decay)
        return [growth.tree.top(budget) for growth in growths]

    def _depth(self, drafter: Drafter, sequence: Sequence) -> int:
        """Levels worth guessing: the last token is the target's own, and the drafter must be able to read along."""
        return min(self.depth, sequence.room - 1, drafter.context - len(sequence.tokens))


# The rule of the SpecExec paper's own code: draft log-probabilities at T = 1, 0.95 a level, 32 passes of 128 nodes.
REFERENCE = BestFirst(width=32, beams=128, depth=32, level_decay=0.95)
REFERENCE_RANKING = Ranking(tau=1.0, shared_noise=False)

PLANNERS = {"best": BestFirst(), "reference": REFERENCE}
RANKINGS = {"best": Ranking(), "reference": REFERENCE_RANKING}


@dataclass
class _Growth:
    """One tree while it grows. Nodes are only ever appended, so their indices hold until `top` trims them."""

    sequence: Sequence
    depth: int
    tree: TokenTree = field(default_factory=TokenTree.empty)
    expanded_N: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    started: bool = False

    def ask(self, budget: int, beams: int) -> Ask:
        """The best unexpanded nodes whose children could still be among the `budget` best."""
        if not budget or self.depth < 1:
            return Ask(self.sequence, self.tree, [])
        if not self.started:
            return Ask(self.sequence, self.tree, [ROOT])
        open_N = (self.expanded_N == 0) & (self.tree.depth_N < self.depth - 1) & (self.tree.reach_N > self._bar(budget))
        nodes = np.flatnonzero(open_N)
        best = np.argsort(-self.tree.reach_N[nodes], kind="stable")[:beams]
        return Ask(self.sequence, self.tree, np.sort(nodes[best]).tolist())

    def _bar(self, budget: int) -> float:
        """Reach that a newcomer has to beat: that of the last node which would be kept now."""
        if len(self.tree) < budget:
            return -np.inf
        return float(np.partition(self.tree.reach_N, -budget)[-budget])

    def add(self, nodes: list[int], guesses: Guesses, budget: int, decay: float) -> None:
        """Append the children that would be kept now."""
        self.started = True
        reach_of_parent: Floats = np.append(self.tree.reach_N, 0.0)  # the last one answers for ROOT
        reach_NK = reach_of_parent[nodes][:, None] + guesses.log_probs_NK + np.log(decay)
        rows, columns = np.nonzero(reach_NK > self._bar(budget))
        self.expanded_N[[node for node in nodes if node != ROOT]] = 1
        self.tree = TokenTree(
            np.concatenate([self.tree.tokens_N, guesses.tokens_NK[rows, columns]]),
            np.concatenate([self.tree.parents_N, np.array(nodes, np.int64)[rows]]),
            np.concatenate([self.tree.reach_N, reach_NK[rows, columns]]),
        )
        self.expanded_N = np.concatenate([self.expanded_N, np.zeros(len(rows), np.int64)])
