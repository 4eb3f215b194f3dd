"""The intervals that every script quotes: the rate of all prompts together, and prompts resampled in pairs."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bootstrap import interval, rate, ratio

ROWS_P2 = np.array([[10, 2], [20, 5], [3, 3], [40, 4]])


def test_a_rate_is_of_all_prompts_together_and_lies_in_its_interval() -> None:
    middle, low, high = rate(ROWS_P2)
    assert middle == pytest.approx(73 / 14)
    assert min(ROWS_P2[:, 0] / ROWS_P2[:, 1]) <= low < middle < high <= max(ROWS_P2[:, 0] / ROWS_P2[:, 1])


def test_a_ratio_is_paired_by_prompt() -> None:
    twice_P2 = ROWS_P2 * [2, 1]
    assert rate(twice_P2, ROWS_P2) == pytest.approx((2, 2, 2)), "prompts differ, the ratio does not"


def test_prompts_that_are_alike_leave_no_doubt() -> None:
    alike_P2 = np.array([[6, 2]] * 5)
    assert interval(alike_P2) == "3.00 (3.00–3.00)"
    assert ratio(alike_P2, alike_P2) == "1.000 (1.000–1.000)"
