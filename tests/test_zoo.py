"""The table of architectures in docs/ says what is found: rows of each kind are tried again, and no row is a bug."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.models.gate import check
from offload.checkpoint.headers import open_folder
from specexec.model import remote_code_check
from specexec.model.remote_code_check import is_tried
from tests.tiny import tiny
from tests.zoo import tried

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
TABLE = PAGE.read_text("utf-8").partition("<!-- made by scripts/zoo.py -->")[2]
ROWS = {row[1]: row[2] for row in re.finditer(r"^\| `([\w.-]+)` \| ([\w ]+) \|", TABLE, re.MULTILINE)}


def test_every_outcome_is_known_and_none_is_a_bug() -> None:
    assert len(ROWS) > 150
    assert {*ROWS.values()} == {"trees", "plain", "refused", "not tried"}


SLOW = {"bailing_hybrid"}  # in transformers' own arithmetic: 20 seconds; test_recurrent.py tries it


def test_what_was_tried_is_not_tried_again_where_it_is_loaded() -> None:
    assert all(is_tried(name) == (outcome in ("trees", "plain")) for name, outcome in ROWS.items())


def test_what_loading_will_try_first_is_planned_without_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values may turn out to stay where they are computed."""
    tiny("gpt_neox", tmp_path)
    folder = open_folder(tmp_path)
    assert check(folder, trees=True)
    monkeypatch.setattr(remote_code_check, "is_tried", lambda *_: False)
    assert not check(folder, trees=True)


# An odd one of each kind: layers that attend twice, caches of their own, a tower without its library, limited logits.
NAMED = ("jetmoe", "llama4_text", "moshi", "longcat_flash", "minimax", "gemma3n", "muse_glimmer")
TRIED = sorted(name for name, outcome in ROWS.items() if outcome != "not tried" and name not in SLOW)


@pytest.mark.parametrize("model_type", [*dict.fromkeys((*NAMED, *TRIED[::10]))])
def test_rows_are_what_is_found(model_type: str) -> None:
    assert tried(model_type).outcome == ROWS[model_type]
