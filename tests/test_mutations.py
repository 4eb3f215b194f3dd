"""Damaged files of every format are refused by documented errors; scripts/mutate_formats.py damages many more."""

from pathlib import Path

import pytest

from offload.checkpoint.headers import ITEM_B
from offload.checkpoint.tensors import DTYPES
from tests.mutations import FAULT, run


def test_a_damaged_file_is_refused_or_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path / "home"))
    outcomes = dict(run(tmp_path / "files", 300))
    assert len(outcomes) == 25
    for name, outcome in outcomes.items():
        assert [what for what in outcome if what.startswith(FAULT)] == [], name
        assert outcome["read"] < outcome.total() * 0.7, f"{name}: most of the damage is of no consequence"


def test_every_type_that_a_header_may_name_can_be_held() -> None:
    assert DTYPES.keys() == ITEM_B.keys()
    assert all(dtype.itemsize == ITEM_B[code] for code, dtype in DTYPES.items())
