"""How many texts fit into memory side by side. Decided with numbers alone: knows no device and no model."""

from __future__ import annotations

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

    def admits(self, lengths: list[int], newcomer: int) -> bool:
        """Whether a text of `newcomer` tokens fits beside those of `lengths`; the first always does.

        `load` has promised room for one text of the whole context.
        """
        return not lengths or sum(map(self.need_B, [*lengths, newcomer])) <= self.free_B
