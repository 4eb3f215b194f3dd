"""How many texts fit into memory side by side. Decided with numbers alone: knows no device and no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from specexec.workspace import rows_held


@dataclass(frozen=True)
class Room:
    """Bytes that the keys and values of all texts may take together, and bytes that one token takes of them.

    Each text may have `nodes` guesses below it.
    """

    free_B: int
    token_B: int
    nodes: int = 0

    def need_B(self, tokens: int) -> int:
        """What a text may come to hold at `tokens` tokens: a hair above the truth, never below."""
        return self.token_B * rows_held(tokens + self.nodes)

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether texts of so many tokens fit side by side."""
        return sum(map(self.need_B, lengths)) <= self.free_B

    def admits(self, lengths: list[int], newcomer: int) -> bool:
        """Whether a text of `newcomer` tokens fits beside those of `lengths`; the first always does.

        `load` has promised room for one text of the whole context.
        """
        return not lengths or self.holds([*lengths, newcomer])
