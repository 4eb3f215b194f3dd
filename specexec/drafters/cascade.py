"""Guesses for the drafter model itself: the nodes it will probably be asked about, read in a pass it makes anyway.

The vertical half of Cascade Speculative Drafting (Chen et al. 2024), for trees. Below every node that a model has to
read hangs a chain of the words that followed the same words before. Where it was right, the next rounds of growth find
their nodes read already and cost no pass. The best tree stays the same, it only takes less time. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from specexec.drafters.cost import Line
from specexec.drafters.protocol import Ask
from specexec.drafters.retrieval.hit_rates import Hits
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.retrieval.suffix_index import LONGEST, NOTHING, RUNGS, Context, follower, then
from specexec.sizes import ALONG, LEVELS
from specexec.tree.tree import ROOT, TokenTree

REACHES = 8  # classes of nodes by how likely the text comes there, a factor of e each
PASSES = 0.25  # of a whole pass that a row saves which is asked about later: the others it was only near
TRIED = 16  # nodes of a pass below which a chain is looked for, the likeliest: for others it is nearly never found
LEAST = 0.05  # chance below which no row is worth it, however cheap
UNMEASURED = 0.3  # the same until the cost of rows has been measured


class Link(NamedTuple):
    """One token of a chain, and the kind of evidence for it."""

    token: int
    cell: int


class Cascade:
    """Chains out of this conversation and what `memory` read lately; how often they are right is counted, by kind."""

    def __init__(self, memory: Memory | None = None, longest: int = 16) -> None:
        self.memory = memory or Memory()
        self.longest = longest
        self.price = Line()  # seconds of answering by a pass over so many rows
        self.spared = Line()  # and without one, about so many nodes
        prior = np.array([0.1, 0.2, 0.4, 0.6, 0.8, 0.9])
        self._hits = Hits(np.repeat(prior, REACHES))

    def chains(self, ask: Ask, nodes: Items[int], levels: int, along: int) -> dict[int, list[Link]]:
        """What probably follows which of the nodes, as far as the chance of being asked pays for a row.

        `levels`: the tree will not be deeper. `along`: rows that were read already and not asked about yet.
        """
        stores = [self.memory.text_of(ask.sequence), self.memory.recent]
        chance_C = self._hits.chances(np.arange(len(RUNGS) * REACHES)[:, None], bool(ask.sequence.sampling.temperature))
        chances, floor = chance_C[:, 0].tolist(), self._floor()
        pays_RK = chance_C.reshape(len(RUNGS), REACHES) >= floor
        least = np.where(pays_RK.max(0), pays_RK.argmax(0), len(RUNGS)).tolist()  # the rung from which evidence pays
        found: dict[int, list[Link]] = {}
        lost_N = -ask.tree.reach_of(list(nodes))
        kind_N = np.minimum(lost_N.astype(np.int64), REACHES - 1)
        room = ALONG - along
        for row in np.argsort(lost_N, kind="stable")[:TRIED].tolist():
            node, kind = nodes[row], int(kind_N[row])
            if room <= 0:
                break
            if least[kind] == len(RUNGS):
                continue
            depth = 0 if node == ROOT else int(ask.tree.depth_N[node]) + 1
            most = min(self.longest, room, min(levels, LEVELS) - 1 - depth)
            context, chance, chain = _context(ask.sequence.words(-LONGEST), ask.tree, node), 1.0, list[Link]()
            while len(chain) < most and (next_one := follower(stores, context, least[kind])) is not None:
                cell = next_one.rung * REACHES + kind
                chance *= chances[cell]
                if chance < floor:
                    break
                chain.append(Link(next_one.token, cell))
                context = then(context, next_one.token)
            if chain:
                found[node] = chain
                room -= len(chain)
        return found

    def learn(self, rows: int, nodes: int, seconds: float) -> None:
        """Answering about so many nodes took so long, with a pass over so many rows; none was needed for 0."""
        (self.price if rows else self.spared).learn(rows or nodes, seconds)

    def count(self, cells: Items[int], asked: bool, sampled: bool) -> None:
        """These links were asked about in the end, or were not although the node above was."""
        if not cells:
            return
        cells_N1 = np.array(cells, np.int64)[:, None]
        self._hits.count(cells_N1, np.full(cells_N1.shape, asked), np.ones(len(cells)), sampled)

    def _floor(self) -> float:
        """The chance from which on a row is worth its seconds: asked about, it saves its like and part of a pass."""
        if not self.price.known:
            return UNMEASURED
        base_s, row_s = self.price.coefficients()
        if self.spared.known:
            base_s = max(base_s - self.spared.coefficients()[0], 0.0)
        return max(row_s / (row_s + PASSES * base_s + 1e-12), LEAST)


def _context(text: Items[int], tree: TokenTree, node: int) -> Context:
    below: list[int] = []
    while node != ROOT and len(below) < LONGEST:
        below.append(int(tree.tokens_N[node]))
        node = int(tree.parents_N[node])
    above = text[: len(below) - LONGEST - 1 : -1]
    return (*below, *above, *[NOTHING] * (LONGEST - len(below) - len(above)))
