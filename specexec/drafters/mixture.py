"""Several drafters' probabilities of the same children, mixed: sum_m w_m P_m(child). Knows no drafter and no model.

How far to believe whom is learned, by how sure each member is: an online mixture of experts, one EM step a choice.
M members   N nodes   K children
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from specexec.learned import Arrays, sound
from specexec.tree.tree import Floats, Ints

SURENESS = np.array([0.05, 0.2, 0.5, 0.8, 0.95])  # borders of the bins that a member's best chance falls into
CENTRES = np.array([0.02, 0.12, 0.35, 0.65, 0.88, 0.98])
ABSENT = len(CENTRES)  # the bin of a member that was not asked
FAITH = 6.0  # choices that the first idea of a weight is worth
MEMORY = 500.0
MOST_CELLS = 512  # that are remembered from run to run
FLOOR = 1e-4  # chance of a token that a member did not name

Cell = tuple[int, ...]  # greedy or sampled, then the bin of each member


@dataclass(frozen=True)
class MemberGuesses:
    """What one member says about some nodes; token -1 is none. `bins_N`: how sure it is, or ABSENT."""

    tokens_NK: Ints
    chances_NK: Floats
    bins_N: Ints

    @staticmethod
    def nothing(nodes: int) -> MemberGuesses:
        """It was not asked."""
        return MemberGuesses(np.zeros((nodes, 0), np.int64), np.zeros((nodes, 0)), np.full(nodes, ABSENT))

    @staticmethod
    def of(tokens_NK: Ints, log_probs_NK: Floats) -> MemberGuesses:
        """It was asked about every node."""
        chances_NK = np.exp(log_probs_NK)
        tokens_NK = np.where(chances_NK > 0, tokens_NK, -1)
        return MemberGuesses(tokens_NK, chances_NK, np.digitize(chances_NK.max(1, initial=0.0), SURENESS))

    def spread(self, rows: Items[int], nodes: int) -> MemberGuesses:
        """The same among `nodes` nodes, of which it was asked about those at `rows`."""
        tokens_NK = np.full((nodes, self.tokens_NK.shape[1]), -1)
        chances_NK, bins_N = np.zeros(tokens_NK.shape), np.full(nodes, ABSENT)
        tokens_NK[rows], chances_NK[rows], bins_N[rows] = self.tokens_NK, self.chances_NK, self.bins_N
        return MemberGuesses(tokens_NK, chances_NK, bins_N)


@dataclass(frozen=True)
class Merged:
    """Each token once: tokens [N, K], -1 = none, and what every member gives it, [M, N, K]."""

    tokens_NK: Ints
    chances_MNK: Floats


def merge(guesses: Items[MemberGuesses]) -> Merged:
    """All members' children; a token that two of them name takes one place."""
    tokens_NK = np.concatenate([one.tokens_NK for one in guesses], axis=1)
    borders = np.cumsum([0, *(one.tokens_NK.shape[1] for one in guesses)]).tolist()
    chances_MNK = np.zeros((len(guesses), *tokens_NK.shape))
    for member, (start, stop) in enumerate(pairwise(borders)):
        chances_MNK[member, :, start:stop] = guesses[member].chances_NK
    for start, stop in pairwise(borders[1:]):
        # A column that repeats a token further left gives its chances to that one and is empty then.
        mine_NK = tokens_NK[:, start:stop]
        same_NLK = (tokens_NK[:, :start, None] == mine_NK[:, None, :]) & (mine_NK[:, None, :] >= 0)
        chances_MNK[:, :, :start] += np.einsum("nlk,mnk->mnl", same_NLK, chances_MNK[:, :, start:stop])
        repeated_NK = same_NLK.any(1)
        chances_MNK[:, :, start:stop] *= ~repeated_NK
        mine_NK[repeated_NK] = -1
    return Merged(tokens_NK, chances_MNK)


@dataclass
class Trust:
    """The weights of the members."""

    counts: dict[Cell, Floats] = field(default_factory=dict)

    def weights(self, cell: Cell) -> Floats:
        """They sum to 1 over the members that were asked."""
        count_M = self._count(cell)
        return np.asarray(count_M / count_M.sum())

    def learn(self, cell: Cell, likelihood_M: Floats, weight: float) -> None:
        """Credit a choice to the members in proportion to what each of them staked on it."""
        count_M = self._count(cell)
        credit_M = count_M * np.maximum(likelihood_M, FLOOR)
        count_M += weight * credit_M / credit_M.sum()
        if count_M.sum() > MEMORY:
            count_M /= 2

    def pack(self) -> dict[str, Floats]:
        """The cells seen most, [C, 1 + M], and their counts, [C, M]."""
        often = sorted(self.counts, key=lambda cell: -float(self.counts[cell].sum()))[:MOST_CELLS]
        if not often:
            return {}
        counts_CM = np.array([self.counts[cell] for cell in often])
        return {"cells": np.array(often, np.float64), "counts": counts_CM}

    def unpack(self, arrays: Arrays) -> None:
        """What an earlier run packed. Raises ValueError for counts of other members than it packed them for."""
        counts_CM = sound(arrays.get("counts", np.zeros(0)), (-1, -1), "a trust")
        cells = sound(arrays.get("cells", np.zeros(0)), (len(counts_CM), counts_CM.shape[1] + 1), "its cells")
        if not (counts_CM.sum(1) > 0).all():
            raise ValueError("the counts of a cell are all zero")
        self.counts = {
            tuple(int(part) for part in cell): count_M.copy() for cell, count_M in zip(cells, counts_CM, strict=True)
        }

    def _count(self, cell: Cell) -> Floats:
        if cell not in self.counts:
            bins_M = np.array(cell[1:])
            # Chances that came true so far: who is bolder at this node knows more about it.
            bold_M = np.where(bins_M == ABSENT, 0.0, CENTRES[np.minimum(bins_M, ABSENT - 1)] ** 2)
            if not bold_M.any():  # no member was asked: their weights do not matter
                bold_M = np.ones(len(bins_M))
            self.counts[cell] = FAITH * bold_M / bold_M.sum()
        return self.counts[cell]
