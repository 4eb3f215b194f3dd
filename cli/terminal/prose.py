"""Text that arrives in pieces, as lines of a terminal: finished ones, which never change, and a tail that still may."""

from __future__ import annotations

from typing import Protocol

from cli.shared.wrap import wrapped


class Prose(Protocol):
    """One stretch of text being written."""

    def feed(self, text: str, width: int) -> list[str]:
        """Add text; the lines that are finished by it."""

    def tail(self, width: int) -> list[str]:
        """What was fed and is not finished, as it looks now."""

    def end(self, width: int) -> list[str]:
        """No more will come: the tail, finished."""


class PlainProse:
    """Text as it was written, broken between words."""

    def __init__(self) -> None:
        self._open = ""

    def feed(self, text: str, width: int) -> list[str]:
        *whole, self._open = (self._open + text).split("\n")
        finished = [line for text_line in whole for line in wrapped(text_line, width)]
        *more, self._open = wrapped(self._open, width)
        return finished + more

    def tail(self, width: int) -> list[str]:
        return wrapped(self._open, width) if self._open else []

    def end(self, width: int) -> list[str]:
        lines, self._open = self.tail(width), ""
        return lines


class Dimmed:
    """Any prose, in a quieter voice."""

    def __init__(self, prose: Prose, dim: str, plain: str) -> None:
        self._prose, self._dim, self._plain = prose, dim, plain

    def feed(self, text: str, width: int) -> list[str]:
        return self._dimmed(self._prose.feed(text, width))

    def tail(self, width: int) -> list[str]:
        return self._dimmed(self._prose.tail(width))

    def end(self, width: int) -> list[str]:
        return self._dimmed(self._prose.end(width))

    def _dimmed(self, lines: list[str]) -> list[str]:
        return [f"{self._dim}{line}{self._plain}" if line else "" for line in lines]
