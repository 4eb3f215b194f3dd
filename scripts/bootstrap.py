"""Rates of all prompts together, with 95 % intervals from a bootstrap over prompts. What scripts that measure share.

P prompts; a row is what was made and what it took, such as tokens and sweeps, or tokens and seconds
"""

from __future__ import annotations

import numpy as np

RESAMPLINGS = 2000


def rate(rows_P2: np.ndarray, against_P2: np.ndarray | None = None) -> tuple[float, float, float]:
    """What was made over what it took, and its interval; if need be over the same of another way, prompt by prompt."""
    picks = np.random.default_rng(0).integers(0, len(rows_P2), (RESAMPLINGS, len(rows_P2)))

    def found(picks: np.ndarray) -> np.ndarray:
        return _rate(rows_P2[picks]) / (1 if against_P2 is None else _rate(against_P2[picks]))

    low, high = np.percentile(found(picks), [2.5, 97.5])
    return float(found(np.arange(len(rows_P2)))), float(low), float(high)


def interval(rows_P2: np.ndarray) -> str:
    """The rate in words."""
    return "{:.2f} ({:.2f}–{:.2f})".format(*rate(rows_P2))


def ratio(ours_P2: np.ndarray, theirs_P2: np.ndarray) -> str:
    """Our rate over theirs in words, on the same prompts."""
    return "{:.3f} ({:.3f}–{:.3f})".format(*rate(ours_P2, theirs_P2))


def _rate(rows_P2: np.ndarray) -> np.ndarray:
    made, took = np.moveaxis(rows_P2.sum(-2), -1, 0)
    return np.asarray(made / took)
