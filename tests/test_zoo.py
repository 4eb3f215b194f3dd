"""The table of architectures says what is so: some of its rows are tried again, and none is a bug."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.zoo import tried

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
ROWS = {row[1]: row[2] for row in re.finditer(r"^\| `([\w.-]+)` \| ([\w ]+) \|", PAGE.read_text("utf-8"), re.MULTILINE)}


def test_no_row_is_a_bug() -> None:
    assert len(ROWS) > 150
    assert not {name: outcome for name, outcome in ROWS.items() if outcome in ("wrong", "error")}


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [("granite", "trees"), ("llava", "trees"), ("bloom", "plain"), ("diffllama", "plain"), ("bert", "refused")],
)
def test_rows_are_what_is_found(model_type: str, outcome: str) -> None:
    assert (tried(model_type).outcome, ROWS[model_type]) == (outcome, outcome)
