"""How much a drafter's scores may be trusted, learned from the target's own choices at every verified node.

P(child | parent) = softmax(s / tau)[child]. After each sweep the target's choice is known at all nodes of the tree, so
tau is the one that would have made those choices most likely (temperature scaling, Guo et al. 2017), nodes weighted by
the chance that the text comes there: off-path nodes are another population.
N nodes   C candidates, best first   G grid of taus
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specexec.learned import Arrays, sound
from specexec.sampling.params import SamplingParams
from specexec.tree.tree import Floats, Ints

NEUTRAL_TAU = 0.85
GRID_G: Floats = np.geomspace(0.1, 4.0, 32)
# A new pair needs about as many clear examples as this to leave the neutral tau; old sweeps count half after MEMORY.
PRIOR_WEIGHT = 2.0
MEMORY_WEIGHT = 400.0
MOST_NODES = 256  # examples taken from one sweep: those the text was most likely to meet
BINS = 10
REMEMBERED_WEIGHT = 50.0  # what an earlier run taught counts like so many examples: a start, not a verdict


@dataclass
class Calibration:
    """One drafter in one temperature regime. `tau` is the best so far; `miss` how often the choice was no candidate."""

    loss_G: Floats = field(default_factory=lambda: np.zeros(len(GRID_G)))
    weight: float = 0.0
    missed: float = 0.0
    bins: Floats = field(default_factory=lambda: np.zeros((2, 3, BINS)))  # [neutral, learned][count, predicted, true]

    @property
    def tau(self) -> float:
        """The tau of least discounted log-loss, held near the neutral one until there is evidence."""
        prior_G = PRIOR_WEIGHT * np.log(GRID_G / NEUTRAL_TAU) ** 2
        return float(GRID_G[np.argmin(self.loss_G + prior_G)]) if self.weight else NEUTRAL_TAU

    @property
    def miss(self) -> float:
        """Chance that the target's choice is not among the candidates at all."""
        return (self.missed + 0.05) / (self.weight + 1.0)

    def learn(self, scores_NC: Floats, hit_N: Ints, weight_N: Floats) -> None:
        """Take the choices of one sweep: `hit_N` is the column of the target's choice, -1 = not a candidate."""
        # A choice that filters forbade the drafter to name says nothing about its scores.
        named_N = (hit_N < 0) | np.isfinite(scores_NC[np.arange(len(hit_N)), hit_N])
        named_N &= np.isfinite(scores_NC).any(1)  # where every candidate was forbidden, none was named
        likely = np.argsort(-weight_N * named_N, kind="stable")[:MOST_NODES]
        likely = likely[named_N[likely]]
        scores_NC, hit_N, weight_N = scores_NC[likely], hit_N[likely], weight_N[likely]
        if not weight_N.sum():
            return
        self._measure(scores_NC, hit_N, weight_N)
        fade = 0.5 ** (weight_N.sum() / MEMORY_WEIGHT)
        found = hit_N >= 0
        self.loss_G = fade * self.loss_G + weight_N[found] @ losses(scores_NC[found], hit_N[found])
        self.weight = fade * self.weight + float(weight_N.sum())
        self.missed = fade * self.missed + float(weight_N[~found].sum())

    def pack(self) -> Floats:
        """The losses, the weight and the misses as one row, [G + 2]; heavy evidence made lighter."""
        return np.array([*self.loss_G, self.weight, self.missed]) * min(1.0, REMEMBERED_WEIGHT / max(self.weight, 1e-9))

    @staticmethod
    def unpacked(row: NDArray[np.generic]) -> Calibration:
        """What `pack` gave. Raises ValueError for a row that no calibration packs."""
        *loss, weight, missed = sound(row, (len(GRID_G) + 2,), "a calibration").tolist()
        if missed > weight:
            raise ValueError("a calibration missed more choices than it saw")
        return Calibration(np.array(loss), weight, missed)

    def _measure(self, scores_NC: Floats, hit_N: Ints, weight_N: Floats) -> None:
        """Sort the best candidates, as predicted before this sweep, into bins: with the neutral and the learned tau."""
        for row, tau in enumerate((NEUTRAL_TAU, self.tau)):
            sure_N = np.exp(log_softmax(scores_NC / tau)[:, 0])
            which_N = np.minimum((sure_N * BINS).astype(np.int64), BINS - 1)
            for column, amount_N in enumerate((weight_N, weight_N * sure_N, weight_N * (hit_N == 0))):
                np.add.at(self.bins[row, column], which_N, amount_N)

    @property
    def expected_error(self) -> tuple[float, float]:
        """Expected calibration error of the best candidate's probability: with the neutral and the learned tau."""
        return expected_error(self.bins)


def expected_error(bins: Floats) -> tuple[float, float]:
    """Mean distance of prediction and truth in `Calibration.bins`: before (the neutral tau) and after."""
    count, predicted, true = bins.transpose(1, 0, 2)
    neutral, learned = np.abs(predicted - true).sum(-1) / np.maximum(count.sum(-1), 1e-9)
    return float(neutral), float(learned)


def losses(scores_NC: Floats, hit_N: Ints) -> Floats:
    """-log P of the chosen candidates under every tau of the grid, [N, G]."""
    shifted_NC = scores_NC - scores_NC.max(-1, keepdims=True)
    chosen_N = np.take_along_axis(shifted_NC, hit_N[:, None], axis=1)[:, 0]
    loss_NG = np.empty((len(hit_N), len(GRID_G)))
    for g, tau in enumerate(GRID_G):  # all at once would be 16 MiB of candidates, several times over
        loss_NG[:, g] = np.log(np.exp(shifted_NC / tau).sum(-1)) - chosen_N / tau
    return np.minimum(loss_NG, 20.0)  # one very unlikely choice must not outweigh a hundred sweeps


def log_softmax(scores: Floats) -> Floats:
    """Over the last axis; a row without a finite score stays -inf."""
    best = scores.max(-1, keepdims=True)
    shifted = scores - np.where(np.isfinite(best), best, 0.0)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.where(total > 0, total, 1.0)))


REGIMES = ("greedy", "cool", "warm", "hot")


def regime(temperature: float) -> str:
    """Temperatures that share a tau. Whether one would do for all was not measured."""
    return "greedy" if temperature == 0 else "cool" if temperature < 0.5 else "warm" if temperature < 0.9 else "hot"


class Calibrated:
    """A drafter that learns how far its scores may be trusted, in each temperature regime."""

    def __init__(self) -> None:
        self.calibrations: dict[str, Calibration] = {}

    def calibration(self, sampling: SamplingParams, depth: int = 0) -> Calibration:
        """What is known about this drafter at this temperature, and at this depth if that makes a difference."""
        warmth = regime(sampling.temperature or 0.0)
        return self.calibrations.setdefault(f"{warmth}-{depth}" if depth else warmth, Calibration())

    def pack(self) -> dict[str, Floats]:
        """How far its scores may be trusted, by temperature regime."""
        return {name: calibration.pack() for name, calibration in self.calibrations.items() if calibration.weight}

    def unpack(self, arrays: Arrays) -> None:
        """Start as wise as an earlier run ended. Raises ValueError for what no calibration packs."""
        self.calibrations = {name: Calibration.unpacked(row) for name, row in arrays.items() if _known(name)}


def _known(name: str) -> bool:
    """Is this a regime, or one and a depth?"""
    warmth, dash, depth = name.partition("-")
    return warmth in REGIMES and (depth.isdecimal() if dash else True)
