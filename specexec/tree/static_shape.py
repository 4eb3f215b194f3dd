"""Trees of ranks whose shape is fixed before a sweep: the likeliest paths, if every rank has one chance."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from specexec.tree.tree import ROOT, Floats, Ints


@dataclass(frozen=True)
class TreeShape:
    """A tree of ranks, parents before children, likeliest first.

    parents_N (ROOT = -1) and ranks_N (0 = the drafter's best child) are int64, chances_N float64: the probability that
    the text passes through the node.
    """

    parents_N: Ints
    ranks_N: Ints
    chances_N: Floats


def static_tree(chance_K: Floats, nodes: int, depth: int) -> TreeShape:
    """The `nodes` likeliest paths of at most `depth` ranks, if every child of rank k has the probability chance_K[k].

    That a chance depends on the rank alone is the positional acceptance assumption of Sequoia (arXiv 2402.12374).
    """
    parents: list[int] = []
    ranks: list[int] = []
    chances: list[float] = []
    # (-chance, order of arrival, parent, rank, level): the next sibling of a node comes up when the node is taken.
    waiting = [(-float(chance_K[0]), 0, ROOT, 0, 0)]
    arrived = 1
    while waiting and len(parents) < nodes:
        lost, _, parent, rank, level = heapq.heappop(waiting)
        parents.append(parent)
        ranks.append(rank)
        chances.append(-lost)
        above = chances[parent] if parent != ROOT else 1.0
        if rank + 1 < len(chance_K):
            heapq.heappush(waiting, (-above * float(chance_K[rank + 1]), arrived, parent, rank + 1, level))
        if level + 1 < depth:
            heapq.heappush(waiting, (lost * float(chance_K[0]), arrived + 1, len(parents) - 1, 0, level + 1))
        arrived += 2
    return TreeShape(np.array(parents, np.int64), np.array(ranks, np.int64), np.array(chances))
