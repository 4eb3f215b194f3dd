"""A drafter answers one question: for these tree nodes, which tokens come next, and how good is each?

N nodes asked about   K children each
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specexec.text.sequence import Sequence
from specexec.tree.tree import Floats, Ints, TokenTree


@dataclass(frozen=True, eq=False)
class Ask:
    """Nodes of one growing tree that want children; ROOT (-1) asks for the first tokens after the text.

    A node is asked about once, and never before its parent was. `waited`: decoding waits for the answer, so it must be
    worth its seconds.
    """

    sequence: Sequence
    tree: TokenTree
    nodes: list[int]
    waited: bool = True


@dataclass(frozen=True, eq=False)
class Guesses:
    """The best children of each asked node: tokens int64 [N, K], log P(target chooses it | parent) float64 [N, K].

    -inf marks an empty place. Of several drafters, bit m of `origins_NK` (int64) says whether member m named the child.
    """

    tokens_NK: Ints
    log_probs_NK: Floats
    origins_NK: Ints | None = None


def nothing(ask: Ask) -> Guesses:
    """No child for any node that was asked about."""
    return Guesses(np.zeros((len(ask.nodes), 0), np.int64), np.zeros((len(ask.nodes), 0)))


class Drafter(Protocol):
    """Where guesses come from. Nothing it says can change the text, only how much of it one sweep confirms.

    What it raises costs its guesses for the open texts, not the answer (guarded.py).
    """

    name: str
    context: int  # the longest text it can look at, in tokens

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """The nodes among these whose answers an earlier pass has brought already: to be asked about first."""
        ...

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """Up to `width` children for every asked node: one Guesses for each ask, rows in the order of its nodes."""
        ...

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """A sweep is over and the text has grown: here is what the target chose.

        choices_M[0] follows the old text, choices_M[1 + node] follows that node of `tree`, off-path nodes included
        (before penalties and filters, which only the walk applies). `kept` are the names of the nodes below the new
        text, which from now on are called 0, 1, 2, …; None if nothing below it was guessed: all names are void.
        """
        ...
