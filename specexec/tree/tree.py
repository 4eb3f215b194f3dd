"""The tree of guessed tokens. Knows nothing of models or devices.   N nodes   D depth"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

ROOT = -1  # parent of a node that follows the text itself


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Guessed continuations of one text, parents before children.

    tokens_N and parents_N are int64; a parent of ROOT (-1) means the node follows the last token of the text.
    reach_N is float64: the estimated natural log-probability that the target's own text passes through the node. Its
    sum of probabilities over a tree is the expected number of accepted tokens (SpecExec, arXiv 2406.02532).
    ids_N names the nodes: trimming a tree moves them, their names stay. By default a node's name is its index.
    origin_N says who guessed them, where several did: bit m for member m. Only for display.
    """

    tokens_N: Ints
    parents_N: Ints
    reach_N: Floats
    ids_N: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    origin_N: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @staticmethod
    def empty() -> TokenTree:
        """The tree of plain decoding: no guess at all."""
        return TokenTree(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    @staticmethod
    def of(
        tokens: Iterable[int],
        parents: Iterable[int],
        reach: Iterable[float] | None = None,
        origin: Iterable[int] = (),
    ) -> TokenTree:
        """A tree from plain lists of equal length; without `reach` every node counts as certain (0.0)."""
        tokens_N = np.array(list(tokens), np.int64)
        reach_N = np.zeros(len(tokens_N)) if reach is None else np.array(list(reach), np.float64)
        parents_N, origin_N = (np.array(list(each), np.int64) for each in (parents, origin))
        return TokenTree(tokens_N, parents_N, reach_N, origin_N=origin_N)

    def __post_init__(self) -> None:
        index_N = np.arange(len(self.tokens_N))
        if len(self.ids_N) != len(index_N):
            object.__setattr__(self, "ids_N", index_N)
        if len(self.origin_N) != len(index_N):
            object.__setattr__(self, "origin_N", np.zeros(len(index_N), np.int64))
        assert self.tokens_N.shape == self.parents_N.shape == self.reach_N.shape
        assert bool(np.all(self.parents_N < index_N)), "a parent must come before its children"

    def __len__(self) -> int:
        return len(self.tokens_N)

    @property
    def tokens(self) -> list[int]:
        return self.tokens_N.tolist()

    @property
    def parents(self) -> list[int]:
        return self.parents_N.tolist()

    @cached_property
    def depth_N(self) -> Ints:
        """Edges above each node, counted from the text, int64 [N]: 0 for a direct continuation."""
        return depths(self.parents_N)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` (ROOT allowed) that carries `token`; the first of equal siblings."""
        found = np.flatnonzero((self.parents_N[node + 1 :] == node) & (self.tokens_N[node + 1 :] == token))
        return int(found[0]) + node + 1 if found.size else None

    def path(self, node: int) -> list[int]:
        """Nodes from the text down to `node`, both ends included."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parents_N[node])
        return nodes[::-1]

    def below(self, node: int) -> NDArray[np.bool_]:
        """Which nodes are `node` or lie below it, bool [N]."""
        below_N = np.zeros(len(self) + 1, bool)  # the last slot answers for ROOT
        below_N[node] = True
        for level in range(int(self.depth_N[node]) + 1, int(self.depth_N.max()) + 1):
            here = np.flatnonzero(self.depth_N == level)
            below_N[here] = below_N[self.parents_N[here]]
        return below_N[:-1]

    def spelled(self, node: int) -> tuple[int, ...]:
        """Tokens from the text down to `node`; none for ROOT."""
        return tuple(self.tokens_N[self.path(node)].tolist())

    def extended(self, tokens: Ints, parents: Ints, reach: Floats, origin: Ints | None = None) -> TokenTree:
        """This tree with n more nodes behind the others, arrays [n]; their parents are among those already here."""
        more = TokenTree(
            np.concatenate([self.tokens_N, tokens]),
            np.concatenate([self.parents_N, parents]),
            np.concatenate([self.reach_N, reach]),
            origin_N=np.concatenate([self.origin_N, np.zeros_like(tokens) if origin is None else origin]),
        )
        below = np.flatnonzero(parents != ROOT)
        depth_new = np.zeros(len(parents), np.int64)
        depth_new[below] = self.depth_N[parents[below]] + 1
        return more._with_depth(np.concatenate([self.depth_N, depth_new]))

    def reach_of(self, nodes: list[int]) -> Floats:
        """The reach of these nodes, float64. That of the text itself, [ROOT], is 0.0; ROOT is asked about alone."""
        return np.zeros(1) if nodes == [ROOT] else self.reach_N[nodes]

    def _with_depth(self, depth_N: Ints) -> TokenTree:
        self.__dict__["depth_N"] = depth_N  # what depth_N would find out by itself, known already
        return self

    def top(self, budget: int) -> TokenTree:
        """The `budget` nodes of highest reach. Reach falls along every path, so they form a tree of their own."""
        if len(self) <= budget:
            return self
        # Stable: of two equal nodes the earlier one stays, and a parent is always the earlier one.
        keep = highest(self.reach_N, budget)
        new_index = np.full(len(self) + 1, ROOT, np.int64)  # the last slot answers for ROOT
        new_index[keep] = np.arange(len(keep))
        kept = TokenTree(
            self.tokens_N[keep], new_index[self.parents_N[keep]], self.reach_N[keep], self.ids_N[keep],
            self.origin_N[keep],
        )  # fmt: skip
        return kept._with_depth(self.depth_N[keep])


def highest(reach_N: Floats, count: int) -> Ints:
    """Indices of the `count` highest, ascending, int64; of equals the earlier ones. Linear in N: no sort of values."""
    if len(reach_N) <= count:
        return np.arange(len(reach_N))
    if not count:
        return np.zeros(0, np.int64)
    last = -np.partition(-reach_N, count - 1)[count - 1]
    above, equal = np.flatnonzero(reach_N > last), np.flatnonzero(reach_N == last)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def depths(parents_N: Ints) -> Ints:
    """Edges above each node of a forest, by pointer doubling: log2(D) passes over N; int64 [N] in and out.

    >>> depths(np.array([ROOT, 0, 1, 0])).tolist()
    [0, 1, 2, 1]
    """
    depth_N = np.where(parents_N < 0, 0, 1).astype(np.int64)
    above_N = parents_N.copy()
    while (moving := np.flatnonzero(above_N >= 0)).size:
        depth_N[moving] += depth_N[above_N[moving]]
        above_N[moving] = above_N[above_N[moving]]
    return depth_N


@dataclass(frozen=True)
class Intervals:
    """Depth-first visiting times: `a` is an ancestor of `b`, or `b` itself, iff enter[a] <= enter[b] < leave[a].

    int64 [N] each. Linear in N where an ancestor matrix would be quadratic.
    """

    enter_N: Ints
    leave_N: Ints


def intervals(parents_N: Ints) -> Intervals:
    """Visiting times of a forest given by parents (ROOT = -1), parents before children; int64 [N] in and out.

    Nodes 0 and 1 follow the text, 2 and 3 follow node 0. Depth first they are visited in the order 0, 2, 3, 1:

    >>> times = intervals(np.array([ROOT, ROOT, 0, 0]))
    >>> times.enter_N.tolist(), times.leave_N.tolist()
    ([0, 3, 1, 2], [3, 4, 2, 3])

    Node 3 is entered at 2. That lies in [0, 3), the interval of node 0, and not in [3, 4), that of node 1: in tree
    attention (SpecInfer, arXiv 2305.09781; SpecExec, arXiv 2406.02532) node 3 sees node 0 and does not see node 1.
    """
    parents = parents_N.tolist()  # two loops over plain numbers: faster than numpy level by level, at every size
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] != ROOT:
            sizes[parents[node]] += sizes[node]
    enter = [0] * len(parents)
    free = [0] * (len(parents) + 1)  # where the next child of each node comes; the last slot answers for ROOT
    for node, parent in enumerate(parents):
        enter[node] = free[parent]
        free[parent] += sizes[node]
        free[node] = enter[node] + 1
    enter_N = np.array(enter, np.int64)
    return Intervals(enter_N, enter_N + np.array(sizes, np.int64))
