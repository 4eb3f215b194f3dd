"""What a scanner finds in an answer, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from specexec.pieces import Call


@dataclass(frozen=True)
class Said:
    """Text of the answer itself, or of a thought."""

    text: str
    thought: bool = False


@dataclass(frozen=True)
class Between:
    """Blank space or a mark around calls and thoughts: no part of the answer unless it turns out to be."""

    text: str


@dataclass(frozen=True)
class Turned:
    """A thought began or ended here."""


Event: TypeAlias = Said | Between | Turned | Call


class Scanner(Protocol):
    """Follows the packed text of one answer."""

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        ...

    def scan(self, text: str, last: bool) -> Iterator[Event]:
        """The next piece of text; what may be the beginning of a mark is held back until it is known, or `last`."""
        ...
