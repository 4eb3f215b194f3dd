"""Other ways to shape a tree, by name, to compare with best-first growth. They guess nothing ahead of the sweep.

N nodes   K children
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.ranking import Ranking
from specexec.planning.best_first import LOOKING_UP, PLANNERS, RANKINGS, Planner
from specexec.planning.budget import Budget, Spent
from specexec.sizes import FIRST_NODES
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.static_shape import TreeShape, static_tree
from specexec.tree.tree import ROOT, Floats, TokenTree

NAMES = (*PLANNERS, "beam", "sequoia")


def planner_of(name: str, sources: Items[str] = ()) -> Planner:
    """A planner that has learned nothing yet, for drafters made of these sources."""
    if name == "best" and list(sources) == ["ngram"]:
        return LOOKING_UP
    return {"beam": Beam, "sequoia": Sequoia}[name]() if name not in PLANNERS else PLANNERS[name]


def ranking_of(name: str) -> Ranking:
    """How its drafters rank."""
    return RANKINGS.get(name, Ranking())


@dataclass
class Beam:
    """Level by level, the same number of nodes on each: as deep as `depth` and as wide as the budget then allows.

    How many an automatic budget takes follows from the chances that were seen in the last trees.
    """

    depth: int = 16
    width: int = 32
    chances_N: Floats = field(default_factory=lambda: np.ones(FIRST_NODES))

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """Expand the best nodes of the lowest level only."""
        nodes = _share(live, budget, self.chances_N)
        beams = -(-nodes // self.depth)
        for sequence in live:
            sequence.growth = Growth()
        for level in range(-1, self.depth - 1 if nodes else -1):
            asks = [ask for one in live if (ask := _level(one, level, beams, _room(drafter, one))).nodes]
            if not asks:
                break
            for ask, guess in zip(asks, drafter.guess(asks, self.width), strict=True):
                ask.sequence.growth.add(ask.nodes, guess.tokens_NK, guess.log_probs_NK, -np.inf, guess.origins_NK)
        grown = [sequence.growth.tree for sequence in live]
        if nodes:
            chances_N = np.exp(np.minimum(np.concatenate([tree.reach_N for tree in grown]), 0.0))
            self.chances_N = np.sort(chances_N)[:: -len(live)]
        return [_beam_of(tree, beams).top(nodes) for tree in grown]

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Nothing ahead."""


@dataclass
class Sequoia:
    """One static tree for every text: the best for acceptance that depends on a child's rank alone (Chen et al. 2024).

    The chances of the ranks are learned from the accepted paths. The paper fills the tree by dynamic programming; as a
    path is worth the product of its ranks' chances, the best tree is the likeliest paths, which a heap finds as well.
    """

    depth: int = 64
    width: int = 32
    offered_K: Floats = field(default_factory=lambda: np.full(32, 4.0))
    hit_K: Floats = field(default_factory=lambda: np.array([4.0 * 0.6 * 0.35**rank for rank in range(32)]))
    _planned: WeakKeyDictionary[Sequence, _Planned] = field(default_factory=WeakKeyDictionary)

    @property
    def chance_K(self) -> Floats:
        """P(the target's choice is the child of this rank), falling."""
        return np.minimum.accumulate(self.hit_K / self.offered_K)

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """Fill the static shape with the drafter's children, level by level."""
        for sequence in live:
            self._learn(sequence)
            sequence.growth = Growth()
        nodes = _share(live, budget, static_tree(self.chance_K, 256, self.depth).chances_N)
        shape = static_tree(self.chance_K, nodes, self.depth)
        plans = {one: _Planned(len(one.tokens), shape) for one in live}
        for _ in range(self.depth if nodes else 0):
            asks = [ask for one in live if (ask := plans[one].ask(one, _room(drafter, one))).nodes]
            if not asks:
                break
            for ask, guess in zip(asks, drafter.guess(asks, self.width), strict=True):
                plans[ask.sequence].fill(ask, guess)
        for sequence in live:
            self._planned[sequence] = plans[sequence]
        return [sequence.growth.tree for sequence in live]

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Nothing ahead."""

    def _learn(self, sequence: Sequence) -> None:
        """Which ranks the text has taken since, and which it was offered."""
        planned = self._planned.pop(sequence, None)
        if planned is None:
            return
        node = ROOT
        for token in sequence.tokens[planned.length :]:
            ranks = {rank: child for child, rank in planned.children(node).items()}
            self.offered_K[list(ranks)] += 1
            taken = next((rank for rank, child in ranks.items() if planned.tokens[child] == token), None)
            if taken is None:
                return
            self.hit_K[taken] += 1
            node = ranks[taken]


@dataclass
class _Planned:
    """One sequence's copy of the shape: which grown node is at which place."""

    length: int
    shape: TreeShape
    node_at: dict[int, int] = field(default_factory=lambda: {ROOT: ROOT})  # place in the shape -> node
    tokens: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    front: list[int] = field(default_factory=lambda: [ROOT])  # places whose children come next

    def ask(self, sequence: Sequence, room: int) -> Ask:
        """The nodes of the lowest level that have children in the shape."""
        tree = sequence.growth.tree
        level = -1 if self.front == [ROOT] else int(tree.depth_N.max(initial=-1))
        wanted = [place for place in self.front if (self.shape.parents_N == place).any()] if level + 1 < room else []
        self.front = wanted
        return Ask(sequence, tree, [self.node_at[place] for place in wanted])

    def fill(self, ask: Ask, guess: Guesses) -> None:
        """Put the drafter's children at their places; their worth is the shape's, not the drafter's."""
        tokens_NK, log_probs_NK = guess.tokens_NK, guess.log_probs_NK
        rank_NK = np.argsort(np.argsort(-log_probs_NK, axis=1, kind="stable"), axis=1, kind="stable")
        worth_NK = np.full(tokens_NK.shape, -np.inf)
        front: list[int] = []
        first = len(self.tokens)
        for row, place in enumerate(self.front):
            at = {int(self.shape.ranks_N[child]): int(child) for child in np.flatnonzero(self.shape.parents_N == place)}
            above = float(self.shape.chances_N[place]) if place != ROOT else 1.0
            for column in range(tokens_NK.shape[1]):
                child = at.get(int(rank_NK[row, column]))
                if child is not None and np.isfinite(log_probs_NK[row, column]):
                    worth_NK[row, column] = np.log(self.shape.chances_N[child] / above)
                    self.node_at[child] = first + len(front)
                    front.append(child)
                    self.tokens.append(int(tokens_NK[row, column]))
                    self.ranks.append(int(self.shape.ranks_N[child]))
                    self.parents.append(ask.nodes[row])
        ask.sequence.growth.add(ask.nodes, tokens_NK, worth_NK, -np.inf, guess.origins_NK)
        self.front = front

    def children(self, node: int) -> dict[int, int]:
        """Rank of each child of a node."""
        return {child: self.ranks[child] for child, parent in enumerate(self.parents) if parent == node}


def _share(live: Items[Sequence], budget: Budget, chances_N: Floats) -> int:
    """Nodes for each sequence."""
    began = time.perf_counter()
    rows = sum(len(sequence.tokens) - sequence.processed for sequence in live)
    chance_N = np.sort(np.repeat(chances_N, len(live)))[::-1]
    return budget.size(chance_N, Spent(rows, len(live), time.perf_counter() - began)) // max(len(live), 1)


def _room(drafter: Drafter, sequence: Sequence) -> int:
    """Levels worth guessing: the last token is the target's own, and the drafter must be able to read along."""
    return min(sequence.room - 1, drafter.context - len(sequence.tokens))


def _level(sequence: Sequence, level: int, beams: int, room: int) -> Ask:
    """The best `beams` nodes of one level; level -1 is the text itself."""
    tree = sequence.growth.tree
    if level + 1 >= room:
        return Ask(sequence, tree, [])
    if level < 0:
        return Ask(sequence, tree, [ROOT])
    nodes = np.flatnonzero(tree.depth_N == level)
    best = nodes[np.argsort(-tree.reach_N[nodes], kind="stable")[:beams]]
    return Ask(sequence, tree, np.sort(best).tolist())


def _beam_of(tree: TokenTree, beams: int) -> TokenTree:
    """Only the best `beams` nodes of each level: the others were never expanded."""
    reach_N = tree.reach_N.copy()
    for level in range(int(tree.depth_N.max(initial=-1)) + 1):
        nodes = np.flatnonzero(tree.depth_N == level)
        reach_N[nodes[np.argsort(-reach_N[nodes], kind="stable")[beams:]]] = -np.inf
    return replace(tree, reach_N=reach_N).top(int(np.isfinite(reach_N).sum()))
