"""Lines of a terminal's width. Text in, lines out; words stay whole where they can."""

from __future__ import annotations

import re
import textwrap

from rich.cells import cell_len, chop_cells

TAB = 8


def wrapped(text: str, width: int) -> list[str]:
    """One line of text as lines of at most `width` cells. All but the last stay as they are when text is added."""
    lines, line = list[str](), ""
    for piece in re.findall(r" +|[^ ]+", text.expandtabs(TAB)):
        if cell_len(line) + cell_len(piece) <= width:
            line += piece
        elif piece[0] == " ":  # the break takes the place of the spaces
            lines.append(line)
            line = ""
        else:
            if line.strip():
                lines.append(line.rstrip(" "))
                line = ""
            *full, line = chop_cells(line + piece, max(width, 2))
            lines += full
    return [*lines, line]


def fold(text: str, width: int) -> str:
    """A remark of one line broken between words, the rest set in; pictures of several lines stay as they are."""
    if "\n" in text or cell_len(text) < width:
        return text
    return textwrap.fill(text, width - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
