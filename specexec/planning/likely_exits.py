"""Where the text will probably leave a submitted tree, and next trees that grow there while the sweep streams.

A walk ends at some node with a choice that was not submitted below it. A few guesses below each such exit would save
little: the next tree would need nearly as many passes. So the likeliest exits get all of their next trees, a few at a
time (SSD/Saguaro: guess what the verification will say).
N nodes
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specexec.text.sequence import Sequence
from specexec.tree.tree import Floats, Ints, TokenTree, highest

TOGETHER = 4  # exits whose trees grow at a time: a drafter pass costs little more for several than for one
SUBMITTED, OUTSIDE = -1, -2  # swept over; neither that nor an exit that was chosen, nor below one


class Exits:
    """The exits of one text's tree. A node that was not submitted is one if its parent was, or is the text's end."""

    def __init__(self, sequence: Sequence, submitted: TokenTree) -> None:
        self._growth = sequence.growth
        self._growth.unfold()
        self._nodes = max(len(submitted), 1)  # of a next tree, and
        self._asked = max(self._growth.asked, 1)  # how many nodes are asked about for it
        self._growing: list[int] = []
        self._exit_N = np.full(len(self._growth.tree), OUTSIDE)  # the chosen exit that a node is, or lies below
        self._exit_N[submitted.ids_N] = SUBMITTED

    def open_nodes(self, depth: int, most: int, room: int) -> list[int]:
        """The best `most` nodes to ask about next, children within `depth` levels; none where nothing is left to do.

        There is `room` for so many more; a tree for which there is none is not begun.
        """
        growth = self._growth
        growth.unfold()
        tree = growth.tree
        if not growth.started:
            return []
        askable_N = ~growth.expanded_N & (tree.depth_N < depth - 1)
        self._name_children(tree)
        open_N = askable_N & (tree.reach_N > self._bar_N(tree))
        together = min(TOGETHER, room // self._asked)
        while not open_N.any() and (chosen := self._likeliest(tree, askable_N, together)):
            self._growing = [node for node in chosen if self._exit_N[node] == OUTSIDE]
            for node in self._growing:
                self._exit_N[tree.below(node)] = node
            open_N = askable_N & (tree.reach_N > self._bar_N(tree))
            open_N[chosen] |= askable_N[chosen]
        nodes = np.flatnonzero(open_N)
        most = min(most, room, max(len(self._growing), 1) * self._nodes // 4 + 1)
        return nodes[highest(tree.reach_N[nodes], most)].tolist()

    def bars(self, nodes: list[int], log_probs_NK: Floats) -> Floats:
        """Reach that children of these nodes have to beat, themselves counted, [N, 1]; inf below a submitted one."""
        tree, exit_N = self._growth.tree, self._exit_N[nodes]
        bar_N, reach_NK = np.full(len(nodes), np.inf), self._growth.reach(nodes, log_probs_NK)
        for node in self._growing:
            among_N = exit_N == node
            known_N = tree.reach_N[self._exit_N == node]
            bar_N[among_N] = self._last(np.concatenate([known_N, reach_NK[among_N].ravel()]))
        return bar_N[:, None]

    def _name_children(self, tree: TokenTree) -> None:
        """Nodes that are new since the last time lie where their parents lie."""
        of_parent_N = self._of(tree.parents_N[len(self._exit_N) :])
        self._exit_N = np.append(self._exit_N, np.where(of_parent_N == SUBMITTED, OUTSIDE, of_parent_N))

    def _of(self, nodes_N: Ints) -> Ints:
        """Where these nodes lie, ROOT allowed."""
        return np.append(self._exit_N, SUBMITTED)[nodes_N]

    def _bar_N(self, tree: TokenTree) -> Floats:
        """Reach of the last node that a next tree would take now; nothing else is asked about."""
        bar_N = np.full(len(tree), np.inf)
        for node in self._growing:
            below_N = self._exit_N == node
            bar_N[below_N] = self._last(tree.reach_N[below_N])
        return bar_N

    def _last(self, reach_N: Floats) -> float:
        """What the first node that finds no place in a next tree reaches, of an exit and all below it."""
        if len(reach_N) <= self._nodes + 1:
            return -np.inf
        return float(-np.partition(-reach_N, self._nodes + 1)[self._nodes + 1])

    def _likeliest(self, tree: TokenTree, askable_N: NDArray[np.bool_], most: int) -> list[int]:
        """The best exits that were not chosen yet, and submitted nodes below which others are still unknown."""
        exits_N = (self._of(tree.parents_N) == SUBMITTED) & (self._exit_N == OUTSIDE)
        nodes = np.flatnonzero(exits_N | (askable_N & (self._exit_N == SUBMITTED)))
        return nodes[highest(tree.reach_N[nodes], most)].tolist()
