"""No guesses: plain decoding, one token a sweep."""

from __future__ import annotations

import numpy as np

from specexec.drafters import Ask, Guesses
from specexec.ranking import Ranking
from specexec.sequence import Sequence


class NoDrafter:
    """Always silent."""

    name = "none"
    context = 0

    def guess(self, asks: list[Ask], width: int, ranking: Ranking) -> list[Guesses]:
        """No children for anybody."""
        return [Guesses(np.zeros((len(ask.nodes), 0), np.int64), np.zeros((len(ask.nodes), 0))) for ask in asks]

    def accepted(self, sequence: Sequence) -> None:
        """Nothing to remember."""
