"""Words on a terminal: whole at every width, however they were cut into pieces; finished lines never change."""

from __future__ import annotations

import textwrap

import pytest
from rich.cells import cell_len

from cli.shared.wrap import fold, wrapped
from cli.terminal.prose import PlainProse
from cli.terminal.table import table

TEXT = "A small drafter guesses a tree of likely continuations. Überraschung! 木の葉 and more of it\n\nend"


def shown(pieces: list[str], width: int) -> list[str]:
    prose, finished = PlainProse(), list[str]()
    for piece in pieces:
        finished += prose.feed(piece, width)
    return finished + prose.end(width)


@pytest.mark.parametrize("width", [20, 40, 200])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_pieces_of_any_size_wrap_like_the_whole_text(width: int, size: int) -> None:
    lines = shown([TEXT[at : at + size] for at in range(0, len(TEXT), size)], width)
    assert lines == shown([TEXT], width)
    assert max(map(cell_len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == " ".join(TEXT.split())


def test_what_is_not_finished_is_in_the_tail() -> None:
    prose = PlainProse()
    assert prose.feed("one two thr", 7) == ["one two"]
    assert prose.tail(7) == ["thr"]
    assert prose.feed("ee\nfour", 7) == ["three"]
    assert (prose.end(7), prose.end(7)) == (["four"], [])


def test_a_terminal_that_was_resized_loses_no_word() -> None:
    prose = PlainProse()
    lines = [line for at, word in enumerate(TEXT.split(" ")) for line in prose.feed(f"{word} ", 20 + 7 * (at % 3))]
    assert " ".join(" ".join(lines + prose.end(30)).split()) == " ".join(TEXT.split())


def test_latin_text_wraps_as_the_library_wraps_it() -> None:
    text = TEXT.partition(" Ü")[0]
    assert wrapped(text, 30) == textwrap.wrap(text, 30)


def test_a_word_wider_than_the_line_is_cut() -> None:
    assert wrapped("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert wrapped("a 木木木木木木木", 6) == ["a", "木木木", "木木木", "木"]


def test_indented_lines_stay_indented() -> None:
    assert wrapped("    return x", 40) == ["    return x"]
    assert wrapped("\treturn", 40) == ["        return"]


def test_lines_that_are_too_long_fold_between_words() -> None:
    assert fold("12 tokens · 3.4 s · 5.6 tok/s", 20) == "12 tokens · 3.4 s ·\n  5.6 tok/s"
    assert fold("Error: it is long\n  why it was so", 12) == "Error: it\n  is long\n  why it\n    was so"
    assert fold("one line\n\nand another", 20) == "one line\n\nand another"


def test_what_is_wider_than_a_line_stays_whole_so_that_it_can_be_copied() -> None:
    assert fold("written to /a/long/path/of/a/file now", 14) == "written to\n  /a/long/path/of/a/file\n  now"


def test_a_second_column_goes_on_below_itself_or_under_the_first() -> None:
    lines = "  /undo         forget the last message\n  /exit         leave"
    assert fold(lines, 34) == ("  /undo         forget the last\n                message\n  /exit         leave")
    assert fold(lines, 25) == "  /undo\n      forget the last\n      message\n  /exit         leave"


def test_cells_are_counted_not_letters() -> None:
    assert fold("日本 日本 日本", 11) == "日本 日本\n  日本"


def test_a_table_too_wide_for_the_terminal_becomes_a_paragraph_a_row() -> None:
    rows = [("", "LONG NAME", "WHERE"), ("▸", "日本", "far away"), ("", "b", "here and there")]
    columns = ["   LONG NAME  WHERE", "▸  日本       far away", "   b          here and there"]
    assert (table(rows), table(rows, 28)) == (columns, columns)
    assert table(rows, 27) == ["▸ long name 日本 ·", "  where far away", "long name b ·", "  where here and there"]


def test_a_cell_too_wide_for_a_line_gets_one_of_its_own() -> None:
    rows = [("NAME", "TARGET"), ("llama", "someone/Llama-3.3-70B-Instruct")]
    assert table(rows, 34) == ["name llama · target", "  someone/Llama-3.3-70B-Instruct"]
