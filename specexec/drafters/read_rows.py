"""Rows that a drafter model has computed below one text: by node, with its logits, requested or read ahead.

Rows are those of the model's tree cache.   N nodes   C candidates   R rows   H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

NOTHING = -1  # the row of a node that was not read
GONE = -2  # the new name of a node that the text has left behind


@dataclass(frozen=True)
class AskedBatch:
    """The candidates of one batch of nodes, kept until the target has chosen."""

    nodes_N: Ints
    tokens_NC: Ints
    scores_NC: Floats

    def renamed(self, names_N: Ints) -> AskedBatch:
        """The candidates of the nodes that have a new name, node n's at n + 1."""
        new_N = names_N[self.nodes_N + 1]
        rows = np.flatnonzero(new_N != GONE)
        return AskedBatch(new_N[rows], self.tokens_NC[rows], self.scores_NC[rows])


class Evidence(NamedTuple):
    """Candidates' scores [N, C], which of them the target chose (-1 = none), and how likely the text came there."""

    scores_NC: Floats
    hit_N: Ints
    weight_N: Floats


def evidence(tree: TokenTree, choices_M: list[int], batches: Items[AskedBatch]) -> Evidence | None:
    """What the target chose at the nodes that were asked about and submitted; None if there are none."""
    if not batches:
        return None
    asked_N = np.concatenate([asked.nodes_N for asked in batches])
    place_N = np.full(max(asked_N.max(), tree.ids_N.max(initial=ROOT)) + 2, -1)  # among the choices; ROOT's is last
    place_N[np.append(ROOT, tree.ids_N)] = np.arange(len(choices_M))
    seen_N = place_N[asked_N] >= 0
    if not seen_N.any():
        return None
    of_N = place_N[asked_N[seen_N]]
    match_NC = np.concatenate([asked.tokens_NC for asked in batches])[seen_N] == np.array(choices_M)[of_N, None]
    hit_N = np.where(match_NC.any(1), match_NC.argmax(1), -1)
    scores_NC = np.concatenate([asked.scores_NC for asked in batches])[seen_N]
    return Evidence(scores_NC, hit_N, np.exp(np.append(0.0, tree.reach_N)[of_N]))


@dataclass(frozen=True)
class Along:
    """A row that was read before it was asked about, and the kind of evidence that it would be."""

    row: int
    cell: int


@dataclass
class Below:
    """What was read below one text: a row for every node that was asked about, and for some that may be.

    The row of node n is `rows_N[n + 1]`, that of ROOT `rows_N[0]`.
    """

    rows_N: Ints
    asked: list[AskedBatch] = field(default_factory=list)
    along: dict[tuple[int, int], Along] = field(default_factory=dict)  # by the row of the parent, and the token
    heard_R: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # the rows of hidden_RH, ascending, and
    waiting_R: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # which were not answered yet
    hidden_RH: Tensor | None = None
    given_RH: Tensor | None = None
    """The hidden states of all rows from the text's end on, where rows of children are computed from them."""

    @staticmethod
    def text(row: int) -> Below:
        """Nothing below a text whose end is this row."""
        return Below(np.array([row]))

    def given(self, rows: Items[int]) -> Tensor:
        """The hidden states of rows from the text's end on, as often as they are wanted."""
        assert self.given_RH is not None
        return self.given_RH[np.asarray(rows, np.int64) - int(self.rows_N[0])]

    def rows(self, nodes: Items[int] | Ints) -> Ints:
        """The rows of these nodes, NOTHING for those that were not read."""
        slots_N = np.asarray(nodes, np.int64) + 1
        return np.where(slots_N < len(self.rows_N), self.rows_N.take(slots_N, mode="clip"), NOTHING)

    def read(self, tree: TokenTree, nodes: list[int]) -> dict[int, tuple[int, int]]:
        """Those of the nodes that have a row which was not asked about yet; its parent's row, and its token."""
        if not self.along:
            return {}
        places = [*zip(self.rows(tree.parents_N[nodes]).tolist(), tree.tokens_N[nodes].tolist(), strict=True)]
        if self.along.keys().isdisjoint(places):  # nearly always
            return {}
        return {node: place for node, place in zip(nodes, places, strict=True) if place in self.along}

    def claim(self, tree: TokenTree, nodes: list[int], first: int) -> tuple[list[int], list[int]]:
        """Give every node its row. Those that were not read yet get rows from `first` on; the others' cells."""
        found = {node: self.along.pop(place) for node, place in self.read(tree, nodes).items()}
        new = [node for node in nodes if node not in found] if found else nodes
        if (missing := max(nodes) + 2 - len(self.rows_N)) > 0:
            self.rows_N = np.append(self.rows_N, np.full(missing + len(self.rows_N), NOTHING))
        self.rows_N[np.array(new, np.int64) + 1] = np.arange(first, first + len(new))
        self.rows_N[np.array([*found], np.int64) + 1] = [along.row for along in found.values()]
        return new, [along.cell for along in found.values()]

    def missed(self) -> list[int]:
        """The cells of rows that were not asked about although the row above was."""
        unasked = {along.row for along in self.along.values()}
        return [along.cell for (parent, _), along in self.along.items() if parent not in unasked]

    def keep_hidden(self, first: int, hidden_RH: Tensor, for_children: bool = False) -> None:
        """Keep the hidden states of the rows from `first` on; those before the text's end were answered.

        They are kept until they are answered, or `for_children` as long as the text does not move on.
        """
        end = max(int(self.rows_N[0]), first)
        kept_RH = hidden_RH[end - first :].clone() if end > first else hidden_RH  # a prompt must not be held for them
        if for_children:
            self.given_RH = kept_RH if self.given_RH is None else torch.cat([self.given_RH, kept_RH])
        before = [] if self.hidden_RH is None else [self.hidden_RH[np.flatnonzero(self.waiting_R)]]
        self.heard_R = np.append(self.heard_R[self.waiting_R], np.arange(end, first + len(hidden_RH)))
        self.waiting_R = np.ones(len(self.heard_R), bool)
        self.hidden_RH = torch.cat([*before, kept_RH])

    def take(self, nodes: list[int]) -> Tensor:
        """The hidden states [N, H] of nodes, for the only time."""
        places_N = np.searchsorted(self.heard_R, self.rows(nodes))
        assert self.hidden_RH is not None
        assert self.waiting_R[places_N].all(), "a node is answered once"
        self.waiting_R[places_N] = False
        return self.hidden_RH[places_N]

    def moved_on(self, end: int, kept_N: Ints) -> tuple[list[int], Below]:
        """Below the text that ends in row `end`, with `kept_N` called 0, 1, 2, …: rows to keep, then counted from 0."""
        rows_N = np.append(end, self.rows(kept_N))
        keep_R = np.sort(rows_N[rows_N != NOTHING])
        last = int(np.flatnonzero(self.rows_N == end)[0]) - 1
        names_N = np.full(max(len(self.rows_N), int(kept_N.max()) + 2), GONE)
        names_N[np.append(last, kept_N) + 1] = np.arange(ROOT, len(kept_N))
        new_N = np.where(rows_N == NOTHING, NOTHING, np.searchsorted(keep_R, rows_N))
        moved = Below(new_N, [batch.renamed(names_N) for batch in self.asked])
        if self.given_RH is not None:
            moved.given_RH = self.given(keep_R.tolist())
        return keep_R.tolist(), moved
