"""A picture of one sweep: what was guessed, what the target kept, and what it wrote instead. Text in, text out.

One column per level: the accepted token, below it at most two siblings that were rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from specexec.stats import Burst
    from specexec.tree import TokenTree

SHOWN_SIBLINGS = 2
_LONGEST = 16  # cells; a longer token is cut


def draw(burst: Burst, decode: Callable[[list[int]], str], width: int, number: int) -> str:
    """The tree of sweep `number`, cut into blocks that fit `width` columns."""
    bonus = burst.tokens[len(burst.path) :]
    depth = max(_depths(burst.tree), default=0)
    title = f"sweep {number} · {burst.nodes} guessed · depth {depth} · accepted {burst.accepted} + {len(bonus)}"
    columns = _columns(burst, bonus, lambda token: readable(decode([token])))
    return "\n".join([title, *_blocks(columns, max(width - 1, _LONGEST + 4))])


def readable(text: str) -> str:
    """A token as one visible word: a dot for a leading space, arrows for line ends and tabs."""
    if text.startswith(" "):
        text = "·" + text[1:]
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    text = "".join(character if character.isprintable() else "�" for character in text) or "<end>"
    return text if cell_len(text) <= _LONGEST else set_cell_size(text, _LONGEST - 1).rstrip() + "…"


def _columns(burst: Burst, bonus: Sequence[int], word: Callable[[int], str]) -> list[list[str]]:
    tree = burst.tree
    columns = []
    for parent, node in zip((-1, *burst.path), burst.path, strict=False):
        columns.append([f"▸ {word(tree.tokens[node])}", *_rejected(tree, parent, node, word)])
    if bonus:  # a text that has ended needs no further word
        last = burst.path[-1] if burst.path else -1
        columns.append([f"│ {word(bonus[0])} ← target", *_rejected(tree, last, None, word)])
    return columns


def _rejected(tree: TokenTree, parent: int, accepted: int | None, word: Callable[[int], str]) -> list[str]:
    """The first siblings at one fork: earlier nodes of a tree are the more promising ones."""
    siblings = [node for node, above in enumerate(tree.parents) if above == parent and node != accepted]
    shown = siblings[:SHOWN_SIBLINGS]
    forks = ["├"] * (len(shown) - 1) + ["└"]
    return [f"{fork} {word(tree.tokens[node])}" for fork, node in zip(forks, shown, strict=False)]


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
