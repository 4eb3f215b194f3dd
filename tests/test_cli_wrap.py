"""Streamed words on a terminal: whole at every width, however they were cut into pieces."""

from __future__ import annotations

import re
import textwrap

import pytest
from rich.cells import cell_len

from cli.screen import fold
from cli.wrap import WordWrap

TEXT = "A small drafter guesses a tree of likely continuations. Überraschung! 木の葉 and more of it\n\nend"


def shown(pieces: list[str], width: int) -> list[str]:
    """The lines a terminal would show: it obeys `n cells back` followed by `erase to the end of the line`."""
    wrap = WordWrap()
    screen = "".join(wrap.feed(piece, width) for piece in pieces)
    while match := re.search(r"\x1b\[(\d+)D\x1b\[K", screen):
        kept = screen[: match.start()]
        while cell_len(screen[: match.start()]) - cell_len(kept) < int(match[1]):
            kept = kept[:-1]
        screen = kept + screen[match.end() :]
    return screen.split("\n")


@pytest.mark.parametrize("width", [20, 40, 200])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_pieces_of_any_size_wrap_like_the_whole_text(width: int, size: int) -> None:
    pieces = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
    lines = shown(pieces, width)
    assert lines == shown([TEXT], width)
    assert " ".join(" ".join(lines).split()) == " ".join(TEXT.split())


def test_latin_text_wraps_as_the_library_wraps_it() -> None:
    text = TEXT.partition(" Ü")[0]
    lines = [line.rstrip() for line in shown([text], 31)]
    assert lines == textwrap.wrap(text, 30)


def test_a_word_wider_than_the_line_is_cut() -> None:
    assert shown(["x" * 25], 11) == ["x" * 10, "x" * 10, "x" * 5]


def test_remarks_fold_between_words_and_pictures_do_not() -> None:
    assert fold("  12 tokens · 3.4 s · 5.6 tok/s", 20) == "  12 tokens · 3.4 s\n  · 5.6 tok/s"
    assert fold("one line", 20) == "one line"
    assert fold("a picture\nof two lines that are long", 10) == "a picture\nof two lines that are long"
