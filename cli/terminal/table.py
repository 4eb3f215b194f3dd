"""Rows of cells as lines for people: in columns, or a paragraph for each row where the terminal is too narrow."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence as Items

from rich.cells import cell_len

_UNBROKEN = "\u00a0"


def table(rows: Items[Items[str]], width: int | None = None) -> list[str]:
    """The first row is the heading. Without a `width` it is that of the terminal, and none in a pipe."""
    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return [line for row in rows[1:] for line in _paragraph(rows[0], row, width)]
    return ["  ".join(_padded(cell, most) for cell, most in zip(row, widths, strict=True)).rstrip() for row in rows]


def _paragraph(heads: Items[str], row: Items[str], width: int) -> list[str]:
    named = [f"{head.lower()} {cell}" for head, cell in zip(heads, row, strict=True) if head and cell not in ("", "-")]
    mark = " ".join(cell for head, cell in zip(heads, row, strict=True) if not head and cell)
    text = " · ".join(one if cell_len(one) > width - 3 else one.replace(" ", _UNBROKEN) for one in named)
    lines = textwrap.wrap(
        f"{mark} {text}".strip(), width - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_UNBROKEN, " ") for line in lines]


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - cell_len(cell))
