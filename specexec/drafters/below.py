"""What a drafter model has read below one text: who asked, what it said, and what nobody has asked about yet.

Rows are those of the model's tree cache.   N nodes   C candidates   R rows   H hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specexec.tree import ROOT, Floats, Ints, TokenTree


@dataclass(frozen=True)
class Asked:
    """The candidates of one batch of nodes, kept until the target has chosen."""

    nodes_N: Ints
    tokens_NC: Ints
    scores_NC: Floats

    def renamed(self, names: dict[int, int]) -> Asked:
        """The candidates of the nodes that have a new name."""
        rows = [row for row, node in enumerate(self.nodes_N.tolist()) if node in names]
        nodes_N = np.array([names[node] for node in self.nodes_N[rows].tolist()], np.int64)
        return Asked(nodes_N, self.tokens_NC[rows], self.scores_NC[rows])


@dataclass(frozen=True)
class Along:
    """A row that was read before anybody asked about it, and the kind of evidence that it would be."""

    row: int
    cell: int


@dataclass
class Below:
    """What was read below one text: a row for every node that was asked about, and for some that may be."""

    row_of_node: dict[int, int]
    asked: list[Asked] = field(default_factory=list)
    along: dict[tuple[int, int], Along] = field(default_factory=dict)  # by the row of the parent, and the token
    heard: dict[int, int] = field(default_factory=dict)  # where in hidden_RH a row stands, until its node is answered
    hidden_RH: Tensor | None = None

    def read(self, tree: TokenTree, nodes: list[int]) -> dict[int, tuple[int, int]]:
        """Those of the nodes that have a row which nobody has asked about yet; its parent's row, and its token."""
        if not self.along:
            return {}
        above = (self.row_of_node[parent] for parent in tree.parents_N[nodes].tolist())
        places = zip(above, tree.tokens_N[nodes].tolist(), strict=True)
        return {node: place for node, place in zip(nodes, places, strict=True) if place in self.along}

    def claim(self, tree: TokenTree, nodes: list[int], first: int) -> tuple[list[int], list[int]]:
        """Give every node its row. Those that were not read yet get rows from `first` on; the others' cells."""
        found = {node: self.along.pop(place) for node, place in self.read(tree, nodes).items()}
        new = [node for node in nodes if node not in found]
        self.row_of_node.update(zip(new, range(first, first + len(new)), strict=True))
        self.row_of_node.update({node: along.row for node, along in found.items()})
        return new, [along.cell for along in found.values()]

    def missed(self) -> list[int]:
        """The cells of rows that nobody asked about although somebody did about the row above."""
        unasked = {along.row for along in self.along.values()}
        return [along.cell for (parent, _), along in self.along.items() if parent not in unasked]

    def hear(self, first: int, hidden_RH: Tensor) -> None:
        """Keep the hidden states of the rows from `first` on; what the text's end stands above is settled."""
        end = max(self.row_of_node[ROOT], first)
        kept_RH = hidden_RH[end - first :].clone() if end > first else hidden_RH  # a prompt must not be held for them
        before = [] if self.hidden_RH is None else [self.hidden_RH[list(self.heard.values())]]
        rows = [*self.heard, *range(end, first + len(hidden_RH))]
        self.heard = {row: place for place, row in enumerate(rows)}
        self.hidden_RH = torch.cat([*before, kept_RH])

    def take(self, nodes: list[int]) -> Tensor:
        """The hidden states [N, H] of nodes, for the only time."""
        assert self.hidden_RH is not None
        return self.hidden_RH[[self.heard.pop(self.row_of_node[node]) for node in nodes]]
