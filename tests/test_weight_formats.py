"""The table of formats in docs/quantized.md says what is found: rows are tried again, and all of them are there."""

from pathlib import Path

import pytest

from tests.weight_formats import ROWS, line, tried

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "quantized.md").read_text("utf-8")
TABLE = PAGE.partition("<!-- table: formats -->")[2].partition("<!-- end -->")[0]


def test_the_table_has_a_line_for_each_format() -> None:
    assert [row.split(" | ")[0].removeprefix("| ") for row in TABLE.strip().splitlines()[2:]] == [*ROWS]


@pytest.mark.parametrize("title", [title for title, row in ROWS.items() if not row.others][::3])
def test_rows_are_what_is_found(title: str, tmp_path: Path) -> None:
    assert line(title, tried(title, tmp_path)) in TABLE.splitlines()
