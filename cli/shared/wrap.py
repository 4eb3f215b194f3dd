"""Lines of a terminal's width. Text in, lines out; words stay whole where they can."""

from __future__ import annotations

import re

from rich.cells import cell_len, chop_cells

TAB = 8
_COLUMN = re.compile(r" *(?:[^ ]+ )*?[^ ]+  +")  # what stands before the first gap of two spaces or more


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
    """Every line that is too long broken between words, the rest below its second column or set in.

    A first column of more than half the width gets lines of its own. Words stay whole, so that a path or an address can
    still be copied.
    """
    return "\n".join(part for line in text.split("\n") for part in _folded(line, width - 1))


def _folded(line: str, width: int) -> list[str]:
    if cell_len(line) <= width:
        return [line]
    indent, column = len(line) - len(line.lstrip(" ")), _COLUMN.match(line)
    if column is None:
        return _filled(line, " " * (indent + 2), width)
    if cell_len(column[0]) <= width // 2:
        return _filled(line, " " * cell_len(column[0]), width)
    below = " " * (indent + 4)
    return [*_folded(column[0].rstrip(" "), width), *_filled(below + line[column.end() :], below, width)]


def _filled(line: str, inset: str, width: int) -> list[str]:
    lines, now = list[str](), ""
    for piece in re.findall(r" +|[^ ]+", line):
        if now.strip(" ") and cell_len(now) + cell_len(piece) > width:
            lines.append(now.rstrip(" "))
            now = inset
            if piece[0] == " ":  # the break takes the place of the spaces
                continue
        now += piece
    return [*lines, now.rstrip(" ")] if now.strip(" ") else lines
