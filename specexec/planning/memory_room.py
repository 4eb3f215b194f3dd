"""How many texts, and guesses below them, fit into memory side by side. Numbers alone: knows no device and no model."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from specexec.sizes import MOST_NODES, drafter_rows, rows_held


@dataclass(frozen=True)
class Room:
    """Bytes that all texts and their guesses may take together, and what takes them.

    token_B and draft_B: keys and values of one token, in the target and in the drafter. node_B: one guess on its way
    through the models. text_B: what a text takes however short it is. Every text that is admitted may have `least`
    guesses below it, under an automatic budget at most `most`. One sweep reads at most `rows` rows of newcomers'
    prompts. A drafter with a window keeps at most `draft_rows` rows of a text. `beside` is another memory, which
    has to hold its part too: the RAM beside a GPU.
    """

    free_B: int
    token_B: int
    draft_B: int = 0
    node_B: int = 0
    text_B: int = 0
    least: int = 0
    most: int = MOST_NODES
    rows: int = sys.maxsize
    draft_rows: int = sys.maxsize
    beside: Room | None = None

    def need_B(self, tokens: int, nodes: int | None = None) -> int:
        """What a text may come to take at `tokens` tokens and `nodes` guesses: a little above the truth, not below."""
        nodes = self.least if nodes is None else nodes
        drafts_B = self.draft_B * rows_held(min(tokens, self.draft_rows) + drafter_rows(nodes))
        return self.token_B * rows_held(tokens + nodes) + drafts_B + self.node_B * nodes + self.text_B

    def holds(self, lengths: Iterable[int], nodes: int | None = None) -> bool:
        """Whether texts of so many tokens fit side by side, each with `nodes` guesses."""
        lengths = [*lengths]
        fits = sum(self.need_B(length, nodes) for length in lengths) <= self.free_B
        return fits and (self.beside is None or self.beside.holds(lengths, nodes))

    def admits(self, lengths: list[int], newcomer: int) -> bool:
        """Whether a text of `newcomer` tokens fits beside those of `lengths`; the first always does.

        `load` has promised room for one text of the whole context.
        """
        return not lengths or self.holds([*lengths, newcomer])

    def nodes(self, lengths: list[int], most: int) -> int:
        """Guesses that each of these texts may have below it, at most `most`; those that are admitted have `least`."""
        too_many = bisect_left(range(most + 1), True, key=lambda nodes: not self.holds(lengths, nodes))
        return max(too_many - 1, min(self.least, most))


PLENTY = Room(free_B=sys.maxsize, token_B=0)
