"""How often each kind of match was right, counted while decoding. Knows no token.

C kinds of evidence (cells)   N nodes   K children
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specexec.tree.tree import Floats, Ints

PRIOR = 4.0  # observations that the prior is worth
MEMORY = 2000.0  # observations a cell remembers; older ones fade, because texts change
FULL = 0.98  # named children never take all: there is always another token


class Hits:
    """A Beta posterior for every cell, for greedy and for sampled text apart."""

    def __init__(self, prior_C: Floats) -> None:
        self.seen_RC = np.full((2, len(prior_C)), PRIOR)
        self.hit_RC = PRIOR * np.stack([prior_C, prior_C])

    def count(self, cells_NK: Ints, hit_NK: NDArray[np.bool_], weight_N: Floats, sampled: bool) -> None:
        """Guesses that were right or wrong, at nodes the text reaches with probability `weight_N`; cell -1 is none."""
        weight_NK = np.where(cells_NK < 0, 0.0, weight_N[:, None])
        seen_C, hit_C = self.seen_RC[int(sampled)], self.hit_RC[int(sampled)]
        np.add.at(seen_C, cells_NK, weight_NK)
        np.add.at(hit_C, cells_NK, weight_NK * hit_NK)
        fade_C = np.minimum(1.0, MEMORY / seen_C)
        seen_C *= fade_C
        hit_C *= fade_C

    def chances(self, cells_NK: Ints, sampled: bool) -> Floats:
        """P(right) of each guess, [N, K]; cell -1 is no guess. Children of one node never sum to more than FULL."""
        chance_C = self.hit_RC[int(sampled)] / self.seen_RC[int(sampled)]
        chances_NK: Floats = np.where(cells_NK < 0, 0.0, chance_C[cells_NK])
        total_N1 = chances_NK.sum(-1, keepdims=True)
        return chances_NK * (FULL / np.maximum(total_N1, FULL))
