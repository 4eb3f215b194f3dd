"""Best-first growth: which guesses are worth a place in the tree.

The best tree of B nodes is the B most probable prefixes. Reach falls along every path, so growing means expanding,
batch by batch, the nodes whose children could still enter the best B (SpecExec 2024, algorithm 1: a parallel Dijkstra).
One bar for all sequences: a node goes where it is most likely to be used (TETRIS, Wu et al. 2025).
N nodes
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specexec.budget import MOST_NODES, Budget, Spent
from specexec.cost import CostModel
from specexec.drafters import Ask, Drafter
from specexec.ranking import Ranking
from specexec.sequence import Sequence
from specexec.tree import Floats, TokenTree
from specexec.workspace import AHEAD, BEAMS, LEVELS


class Planner(Protocol):
    """Decides the shape of the trees. They grow in `sequence.growth`."""

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """A tree for every sequence: the best nodes of them all, as many as the budget says."""
        ...

    def grow_on(self, drafter: Drafter, live: Items[Sequence], nodes: int, until: Callable[[], bool]) -> None:
        """Guess beyond the `nodes` submitted ones for as long as nobody waits."""
        ...


@dataclass(frozen=True)
class BestFirst:
    """Expand the most probable nodes first, all sequences in one drafter pass, at most `depth` passes.

    `width` children are considered for each node, `beams` nodes expanded for each sequence and pass. `level_decay`
    multiplies reach once a level.
    """

    width: int = 32
    beams: int = BEAMS
    depth: int = LEVELS
    level_decay: float = 1.0

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """The most probable prefixes of all sequences together, as the drafter sees them."""
        began, rows = time.perf_counter(), sum(len(sequence.tokens) - sequence.processed for sequence in live)
        chance_N = _chances(live)
        for _ in range(self.depth):
            spent = Spent(rows, len(live), time.perf_counter() - began)
            horizon = budget.horizon(chance_N, spent)
            asks = self._asks(drafter, live, _bar(live, horizon))
            asked = sum(len(ask.nodes) for ask in asks)
            asked_chance = sum(_chance_of(ask) for ask in asks)
            if not asked or not budget.pays(asked_chance, asked, chance_N, spent):
                break
            before, started = chance_N[:horizon].sum(), time.perf_counter()
            self._extend(drafter, asks, _bar(live, AHEAD * horizon))
            chance_N = _chances(live)
            won = chance_N[:horizon].sum() - before
            if all(ask.sequence.processed for ask in asks):  # a first pass reads the whole prompt: not what passes cost
                cost.learn_draft(asked, time.perf_counter() - started, asked_chance, won)
        spent = Spent(rows, len(live), time.perf_counter() - began)
        return _best([sequence.growth.tree for sequence in live], budget.size(chance_N, spent))

    def grow_on(self, drafter: Drafter, live: Items[Sequence], nodes: int, until: Callable[[], bool]) -> None:
        """The likeliest exits first: a node that was not submitted is reached exactly if the walk ends above it."""
        while not until():
            bar = _bar(live, AHEAD * nodes)
            asks = self._asks(drafter, live, bar)
            if not asks:
                return
            self._extend(drafter, asks, bar)

    def _asks(self, drafter: Drafter, live: Items[Sequence], bar: float) -> list[Ask]:
        asks = [
            Ask(one, one.growth.tree, one.growth.open_nodes(bar, self._depth(drafter, one), self.beams)) for one in live
        ]
        return [ask for ask in asks if ask.nodes]

    def _extend(self, drafter: Drafter, asks: list[Ask], bar: float) -> None:
        for ask, guess in zip(asks, drafter.guess(asks, self.width), strict=True):
            log_probs_NK = guess.log_probs_NK + np.log(self.level_decay)
            ask.sequence.growth.add(ask.nodes, guess.tokens_NK, log_probs_NK, bar)

    def _depth(self, drafter: Drafter, sequence: Sequence) -> int:
        """Levels worth guessing: the last token is the target's own, and the drafter must be able to read along."""
        return min(self.depth, sequence.room - 1, drafter.context - len(sequence.tokens))


# The rule of the SpecExec paper's own code: draft log-probabilities at T = 1, 0.95 a level, 32 passes of 128 nodes.
REFERENCE = BestFirst(width=32, beams=128, depth=32, level_decay=0.95)
REFERENCE_RANKING = Ranking(tau=1.0, shared_noise=False)

PLANNERS = {"best": BestFirst(), "reference": REFERENCE}
RANKINGS = {"best": Ranking(), "reference": REFERENCE_RANKING}


def _chances(live: Items[Sequence]) -> Floats:
    """exp(reach) of the nodes of all sequences, best first, as many as one sweep may carry."""
    lost_N = -np.concatenate([sequence.growth.tree.reach_N for sequence in live])
    best_N = np.partition(lost_N, MOST_NODES)[:MOST_NODES] if len(lost_N) > MOST_NODES else lost_N
    return np.exp(-np.sort(best_N))


def _chance_of(ask: Ask) -> float:
    reach_N = np.append(ask.tree.reach_N, 0.0)  # the last one answers for ROOT
    return float(np.exp(reach_N[ask.nodes]).sum())


def _bar(live: Items[Sequence], total: int) -> float:
    """Reach that a newcomer has to beat: that of the last of `total` nodes which would be kept now."""
    reach_N = np.concatenate([sequence.growth.tree.reach_N for sequence in live])
    if not total:
        return np.inf
    return float(np.partition(reach_N, -total)[-total]) if len(reach_N) >= total else -np.inf


def _best(trees: Items[TokenTree], total: int) -> list[TokenTree]:
    """Every tree cut back to its share of the `total` nodes of highest reach among all of them."""
    if sum(map(len, trees)) <= total:
        return list(trees)
    owner_N = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    # Stable, like `top`: within a tree the same nodes stay, whoever else is there.
    keep = np.argsort(-np.concatenate([tree.reach_N for tree in trees]), kind="stable")[:total]
    shares = np.bincount(owner_N[keep], minlength=len(trees)).tolist()
    return [tree.top(share) for tree, share in zip(trees, shares, strict=True)]
