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
from dataclasses import dataclass, replace
from itertools import compress
from typing import Protocol

import numpy as np

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter
from specexec.drafters.ranking import Ranking
from specexec.planning.budget import Budget, Spent
from specexec.planning.likely_exits import Exits
from specexec.sizes import AHEAD, BEAMS, LEVELS, MOST_NODES, beams, drafted
from specexec.text.sequence import Sequence
from specexec.tree.tree import Floats, TokenTree, highest


class Planner(Protocol):
    """Decides the shape of the trees. They grow in `sequence.growth`."""

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """A tree for every sequence: the best nodes of them all, as many as the budget says."""
        ...

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Guess beyond the submitted `trees` until `until()` is true; decoding does not wait for it."""
        ...


@dataclass(frozen=True)
class BestFirst:
    """Expand the most probable nodes first, all sequences in one drafter pass, at most `depth` passes.

    `width` children are considered for each node, `beams` nodes expanded for each sequence and pass: by default more
    for larger trees. `level_decay` multiplies reach once a level.
    """

    width: int = 32
    beams: int | None = None
    depth: int = LEVELS
    level_decay: float = 1.0

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """The most probable prefixes of all sequences together, as the drafter sees them."""
        began, rows = time.perf_counter(), sum(len(sequence.tokens) - sequence.processed for sequence in live)
        reach_N = _ranked(live)
        passes = 0
        while passes < self.depth:
            spent, chance_N = Spent(rows, len(live), time.perf_counter() - began), np.exp(reach_N[:MOST_NODES])
            horizon = budget.horizon(chance_N, spent)
            asks = self._asks(drafter, live, _bar(reach_N, horizon), self.beams or beams(horizon // len(live)))
            open_N, read = _reach_of(asks), drafter.at_hand(asks)
            if read and _reach_of(read).max() == open_N.max():  # no pass; and the bar is higher when others are asked
                reach_N = self._extend(drafter, read, reach_N, AHEAD * horizon)
                continue
            asked_N = np.sort(open_N)[::-1]
            asked = budget.worth_asking(np.exp(asked_N), chance_N, spent)
            if not asked:
                break
            passes += 1
            asks = _likeliest(asks, open_N, asked)
            before, started = chance_N[:horizon].sum(), time.perf_counter()
            reach_N = self._extend(drafter, asks, reach_N, AHEAD * horizon)
            won = np.exp(reach_N[:MOST_NODES])[:horizon].sum() - before
            if all(ask.sequence.processed for ask in asks):  # a first pass reads the whole prompt: not what passes cost
                cost.learn_draft(asked, time.perf_counter() - started, float(np.exp(asked_N[:asked]).sum()), won)
        spent = Spent(rows, len(live), time.perf_counter() - began)
        size = budget.size(np.exp(reach_N[:MOST_NODES]), spent)
        return _best([sequence.growth.tree.top(sequence.most_nodes) for sequence in live], size)

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Whole next trees, the likeliest exits first, for as long as there is room."""
        ways_out = {one: Exits(one, tree) for one, tree in zip(live, trees, strict=True)}
        most = self.beams or BEAMS
        while not until():
            asks = [
                Ask(one, one.growth.tree, nodes, waited=False)
                for one, exits in ways_out.items()
                if (nodes := exits.open_nodes(self._depth(drafter, one), most, self._room(one)))
            ]
            if not asks:
                return
            asks = drafter.at_hand(asks) or _likeliest(asks, _reach_of(asks), most)
            for ask, guess in zip(asks, drafter.guess(asks, self.width), strict=True):
                log_probs_NK = guess.log_probs_NK + np.log(self.level_decay)
                bar_N1 = ways_out[ask.sequence].bars(ask.nodes, log_probs_NK)
                ask.sequence.growth.add(ask.nodes, guess.tokens_NK, log_probs_NK, bar_N1, guess.origins_NK)

    def _asks(self, drafter: Drafter, live: Items[Sequence], bar: float, most: int) -> list[Ask]:
        asks = [
            Ask(one, one.growth.tree, one.growth.open_nodes(bar, self._depth(drafter, one), min(most, self._room(one))))
            for one in live
        ]
        return [ask for ask in asks if ask.nodes]

    def _extend(self, drafter: Drafter, asks: list[Ask], reach_N: Floats, most: int) -> Floats:
        """Add the children that are among the best `most` nodes, those known so far included.

        `reach_N` is the reach of those, best first; returns the same with the newcomers.
        """
        guesses = drafter.guess(asks, self.width)
        log_probs = [guess.log_probs_NK + np.log(self.level_decay) for guess in guesses]
        new = [ask.sequence.growth.reach(ask.nodes, own).ravel() for ask, own in zip(asks, log_probs, strict=True)]
        new_N, known_N = np.concatenate(new), reach_N[:most]
        best_N = _merged(known_N, new_N[new_N > _bar(known_N, most)])
        bar = float(np.nextafter(_bar(best_N, most), -np.inf))  # it may be a newcomer itself: equals are let in
        came = []
        for ask, guess, log_probs_NK in zip(asks, guesses, log_probs, strict=True):
            growth, before = ask.sequence.growth, len(ask.sequence.growth.tree)
            growth.add(ask.nodes, guess.tokens_NK, log_probs_NK, bar, guess.origins_NK)
            came.append(growth.tree.reach_N[before:])
        return _merged(reach_N, np.concatenate(came))[: AHEAD * MOST_NODES]

    def _room(self, sequence: Sequence) -> int:
        """Nodes that may still be asked about: memory has room for the drafter's rows of so many in all."""
        return max(drafted(sequence.most_nodes) - sequence.growth.asked, 0)

    def _depth(self, drafter: Drafter, sequence: Sequence) -> int:
        """Levels worth guessing: the last token is the target's own, and the drafter must be able to read along."""
        return min(self.depth, sequence.room - 1, drafter.context - len(sequence.tokens))


# The rule of the SpecExec paper's own code: draft log-probabilities at T = 1, 0.95 a level, 32 passes of 128 nodes.
REFERENCE = BestFirst(width=32, beams=128, depth=32, level_decay=0.95)
REFERENCE_RANKING = Ranking(tau=1.0, shared_noise=False)

# A model reads many nodes as fast as one; a look-up takes its time for each, and most of a large batch are not used.
LOOKING_UP = BestFirst(beams=16)

PLANNERS = {"best": BestFirst(), "reference": REFERENCE}
RANKINGS = {"best": Ranking(), "reference": REFERENCE_RANKING}


def _ranked(live: Items[Sequence]) -> Floats:
    """The reach of the nodes of all sequences, best first, as many as a bar may ask for."""
    lost_N, most = -np.concatenate([sequence.growth.tree.reach_N for sequence in live]), AHEAD * MOST_NODES
    return -np.sort(np.partition(lost_N, most)[:most] if len(lost_N) > most else lost_N)


def _merged(best_N: Floats, more_N: Floats) -> Floats:
    """What is best first already and more, best first."""
    lost_N = np.concatenate([-best_N, np.sort(-more_N)])
    return -np.sort(lost_N, kind="stable")  # which finds both runs and only merges them


def _reach_of(asks: list[Ask]) -> Floats:
    """Of every node that is asked about, ask by ask."""
    return np.concatenate([ask.tree.reach_of(ask.nodes) for ask in asks] or [np.zeros(0)])


def _likeliest(asks: list[Ask], reach_N: Floats, total: int) -> list[Ask]:
    """The `total` nodes of highest reach among all that are asked about, ask by ask."""
    if total >= len(reach_N):
        return asks
    kept_N = np.zeros(len(reach_N), bool)
    kept_N[highest(reach_N, total)] = True
    shares = np.split(kept_N, np.cumsum([len(ask.nodes) for ask in asks])[:-1])
    trimmed = [replace(ask, nodes=list(compress(ask.nodes, share))) for ask, share in zip(asks, shares, strict=True)]
    return [ask for ask in trimmed if ask.nodes]


def _bar(reach_N: Floats, total: int) -> float:
    """Reach that a newcomer has to beat: that of the last of `total` nodes which would be kept now."""
    if not total:
        return np.inf
    return float(reach_N[total - 1]) if len(reach_N) >= total else -np.inf


def _best(trees: Items[TokenTree], total: int) -> list[TokenTree]:
    """Every tree cut back to its share of the `total` nodes of highest reach among all of them."""
    if sum(map(len, trees)) <= total:
        return list(trees)
    owner_N = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    # Like `top`: within a tree the same nodes stay, whatever the other trees are.
    keep = highest(np.concatenate([tree.reach_N for tree in trees]), total)
    shares = np.bincount(owner_N[keep], minlength=len(trees)).tolist()
    return [tree.top(share) for tree, share in zip(trees, shares, strict=True)]
