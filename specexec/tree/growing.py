"""One tree while it grows. Nodes are only ever appended, so a node's index names it until the text moves on.

N nodes   K children of one node
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specexec.tree.tree import ROOT, Floats, Ints, TokenTree, highest

LIKELY = np.log(0.02)


class _Children(NamedTuple):
    """Some nodes that may yet be appended."""

    tokens_N: Ints
    parents_N: Ints
    reach_N: Floats
    origin_N: Ints


@dataclass(eq=False)
class Growth:
    """A growing tree and which of its nodes have been asked for children. `started`: the text itself has.

    `expanded_N`: bool [N]. `ahead`: some nodes were asked about while a sweep streamed, before the text came here.
    `aside`: children that only matter if the text comes to their parent, several times as many as there are others.
    """

    tree: TokenTree = field(default_factory=TokenTree.empty)
    expanded_N: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    started: bool = False
    ahead: bool = False
    aside: list[_Children] = field(default_factory=list)

    @property
    def asked(self) -> int:
        """Nodes that have been asked for children: the drafter's cache has a row for each."""
        return int(self.expanded_N.sum())

    def open_nodes(self, bar: float, depth: int, most: int) -> list[int]:
        """The `most` best nodes to ask next: reach (a log-probability) above `bar`, children within `depth` levels.

        The parallel Dijkstra of SpecExec (arXiv 2406.02532, algorithm 1) asks them all in one pass of the drafter.
        """
        if depth < 1:
            return []
        if not self.started:
            return [ROOT] if bar < 0 else []
        open_N = ~self.expanded_N & (self.tree.depth_N < depth - 1) & (self.tree.reach_N > bar)
        nodes = np.flatnonzero(open_N)
        return nodes[highest(self.tree.reach_N[nodes], most)].tolist()

    def reach(self, nodes: list[int], log_probs_NK: Floats) -> Floats:
        """What children of these nodes would reach: float64 [N, K], log-probabilities."""
        return self.tree.reach_of(nodes)[:, None] + log_probs_NK

    def add(
        self,
        nodes: list[int],
        tokens_NK: Ints,
        log_probs_NK: Floats,
        bar: float | Floats,
        origins_NK: Ints | None = None,
    ) -> None:
        """Append the children of the asked nodes whose reach lies above `bar`; put aside others that likely follow.

        `tokens_NK` int64, `log_probs_NK` float64 given the parent, `origins_NK` int64 bits of members. One bar for all,
        or one for each node's children, [N, 1].

        A node is asked only once: if the text comes to it, its likely children must be there, however far off it was.
        """
        self.started = True
        reach_NK = self.reach(nodes, log_probs_NK)
        self.expanded_N[[node for node in nodes if node != ROOT]] = True
        if origins_NK is None:
            origins_NK = np.zeros_like(tokens_NK)

        def children(chosen_NK: NDArray[np.bool_]) -> _Children:
            rows, columns = np.nonzero(chosen_NK)
            at = rows, columns
            return _Children(tokens_NK[at], np.array(nodes, np.int64)[rows], reach_NK[at], origins_NK[at])

        above_NK = reach_NK > bar
        self.aside.append(children((log_probs_NK > LIKELY) & ~above_NK))
        self._append(children(above_NK))

    def unfold(self) -> None:
        """Append what was put aside."""
        aside, self.aside = self.aside, []
        if aside:
            self._append(_Children(*map(np.concatenate, zip(*aside, strict=True))))

    def _append(self, new: _Children) -> None:
        self.tree = self.tree.extended(*new)
        self.expanded_N = np.concatenate([self.expanded_N, np.zeros(len(new.tokens_N), bool)])

    def below(self, tokens: tuple[int, ...]) -> Ints | None:
        """Indices of all nodes below the path that spells `tokens`, int64; None if that was not guessed and asked."""
        node = ROOT
        for token in tokens:
            child = self.tree.child(node, token)
            if child is None:
                return None
            node = child
        if node == ROOT or not self.expanded_N[node]:
            return None
        self.unfold()
        below_N = self.tree.below(node)
        below_N[node] = False
        return np.flatnonzero(below_N) if below_N.any() else None

    def moved_on(self, tokens: tuple[int, ...], kept: Ints, ahead: bool) -> Growth:
        """The same guesses as seen from the end of `tokens`: `kept` (from `below`) become nodes 0, 1, 2, …"""
        top = self.tree.reach_N[_spelled(self.tree, tokens)]
        new_index = np.full(len(self.tree) + 1, ROOT, np.int64)
        new_index[kept] = np.arange(len(kept))
        old = self.tree
        tree = TokenTree(
            old.tokens_N[kept], new_index[old.parents_N[kept]], old.reach_N[kept] - top, origin_N=old.origin_N[kept]
        )
        return Growth(tree, self.expanded_N[kept], started=True, ahead=ahead)


def _spelled(tree: TokenTree, tokens: tuple[int, ...]) -> int:
    node = ROOT
    for token in tokens:
        child = tree.child(node, token)
        assert child is not None
        node = child
    return node
