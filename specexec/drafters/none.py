"""No guesses: plain decoding, one token a sweep."""

from __future__ import annotations

import numpy as np

from specexec.drafters.protocol import Ask, Guesses
from specexec.text.sequence import Sequence
from specexec.tree.tree import Ints, TokenTree


class NoDrafter:
    """Always silent."""

    name = "none"
    context = 0

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: there are no answers."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """No children for any node."""
        return [Guesses(np.zeros((len(ask.nodes), 0), np.int64), np.zeros((len(ask.nodes), 0))) for ask in asks]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Nothing to remember."""
