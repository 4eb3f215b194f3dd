"""How many texts fit into memory side by side. Decided with numbers alone: knows no device and no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specexec.cache import GROWTH_ROWS

# Rows of a cache grow by half as much again, so a text may hold this much more than it needs.
SLACK = 1.5


@dataclass(frozen=True)
class Room:
    """Bytes that the keys and values of all texts may take together, and bytes that one token takes of them."""

    free_B: int
    token_B: int

    def need_B(self, tokens: int) -> int:
        """What a text may come to hold at `tokens` tokens: a hair above the truth, never below."""
        return int(self.token_B * (SLACK * tokens + GROWTH_ROWS))

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether texts of so many tokens fit side by side."""
        return sum(map(self.need_B, lengths)) <= self.free_B

    def admits(self, lengths: list[int], newcomer: int) -> bool:
        """Whether a text of `newcomer` tokens fits beside those of `lengths`; the first always does.

        `load` has promised room for one text of the whole context.
        """
        return not lengths or self.holds([*lengths, newcomer])
