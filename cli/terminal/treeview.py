"""A picture of one sweep: what was guessed, what the target kept, and what it wrote instead. Text in, text out.

One column per level: the accepted token, below it at most two siblings that were rejected. Each with the chance it was
given after the token above it, and with who guessed it, where several did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from specexec.stats import Burst
    from specexec.tree.tree import TokenTree

SHOWN_SIBLINGS = 2
_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"  # of the drafters, in the order of their names
_LONGEST = 16  # cells; a longer token is cut


def draw(burst: Burst, decode: Callable[[list[int]], str], width: int, number: int, drafters: str = "") -> str:
    """The tree of sweep `number`, cut into blocks that fit `width` columns; `drafters` joined by +, as a union is."""
    bonus = burst.tokens[len(burst.path) :]
    depth = max(_depths(burst.tree), default=0)
    title = f"sweep {number} · {burst.nodes} guessed · depth {depth} · accepted {burst.accepted} + {len(bonus)}"
    names = drafters.split("+")
    if len(names) > 1:
        title += " · " + " ".join(f"{mark} {name}" for mark, name in zip(_MARKS, names, strict=False))
    shown = _Shown(burst.tree, lambda token: readable(decode([token])), len(names))
    return "\n".join([title, *_blocks(_columns(burst, bonus, shown), max(width - 1, _LONGEST + 4))])


@dataclass(frozen=True)
class _Shown:
    """Nodes as words."""

    tree: TokenTree
    word: Callable[[int], str]
    drafters: int

    def node(self, node: int) -> str:
        """Its token, who guessed it, and the chance it was given after the token above it."""
        tree, parent = self.tree, self.tree.parents[node]
        above = float(tree.reach_N[parent]) if parent >= 0 else 0.0
        bits = int(tree.origin_N[node]) if self.drafters > 1 else 0
        marks = "".join(mark for bit, mark in enumerate(_MARKS) if bits >> bit & 1)
        return f"{self.word(tree.tokens[node])}{marks} {100 * math.exp(float(tree.reach_N[node]) - above):.0f}%"


def readable(text: str) -> str:
    """A token as one visible word: a dot for a leading space, arrows for line ends and tabs."""
    if text.startswith(" "):
        text = "·" + text[1:]
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    text = "".join(character if character.isprintable() else "�" for character in text) or "<end>"
    return text if cell_len(text) <= _LONGEST else set_cell_size(text, _LONGEST - 1).rstrip() + "…"


def _columns(burst: Burst, bonus: Sequence[int], shown: _Shown) -> list[list[str]]:
    tree = burst.tree
    columns = []
    for parent, node in zip((-1, *burst.path), burst.path, strict=False):
        columns.append([f"▸ {shown.node(node)}", *_rejected(tree, parent, node, shown)])
    if bonus:  # a text that has ended needs no further word
        last = burst.path[-1] if burst.path else -1
        columns.append([f"│ {shown.word(bonus[0])} ← target", *_rejected(tree, last, None, shown)])
    return columns


def _rejected(tree: TokenTree, parent: int, accepted: int | None, shown: _Shown) -> list[str]:
    """The first siblings at one fork: earlier nodes of a tree are the more promising ones."""
    siblings = [node for node, above in enumerate(tree.parents) if above == parent and node != accepted]
    few = siblings[:SHOWN_SIBLINGS]
    forks = ["├"] * (len(few) - 1) + ["└"]
    return [f"{fork} {shown.node(node)}" for fork, node in zip(forks, few, strict=False)]


def _blocks(columns: list[list[str]], width: int) -> list[str]:
    """Columns side by side, as many as fit, then again below."""
    lines: list[str] = []
    rows: list[str] = []
    for column in columns:
        cells = max(cell_len(cell) for cell in column)
        if rows and cell_len(rows[0]) + 1 + cells > width:
            lines += [row.rstrip() for row in rows if row.strip()]
            rows = []
        rows = rows or [""] * (1 + SHOWN_SIBLINGS)
        padded = [set_cell_size(cell, cells) for cell in column + [""] * (len(rows) - len(column))]
        rows = [f"{row} {cell}" for row, cell in zip(rows, padded, strict=True)]
    return lines + [row.rstrip() for row in rows if row.strip()]


def _depths(tree: TokenTree) -> list[int]:
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths
