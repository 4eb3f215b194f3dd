"""What a scanner finds in an answer, in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from specexec.pieces import Call, Malformed

_HALVES = re.compile("[\ud800-\udfff]")  # of characters; those that are no marks come from escapes


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


def calls_in(text: str, read: Callable[[str], list[Call]]) -> list[Call]:
    """The calls that a form reads in packed text. Raises Unfinished, Malformed.

    What is nested too deeply to be read is malformed, and so are escapes that stand for half a character: no text holds
    such a thing, and they would be taken for marks.
    """
    try:
        calls = read(text)
    except RecursionError:
        raise Malformed from None
    halves = {half for call in calls for half in _HALVES.findall(call.name + call.arguments + call.id)}
    if not halves <= {*text}:
        raise Malformed
    return calls
