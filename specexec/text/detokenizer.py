"""Tokens into text, burst by burst: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

INCOMPLETE = "\ufffd"  # how a decoder shows the bytes of an unfinished character


class TextStream:
    """The growing text of one answer. The parts `take` returns add up to the decoded answer, cut at a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Items[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._given = 0
        self._cut: int | None = None

    def add(self, token: int) -> bool:
        """Append a token; True if the text now holds a stop string."""
        self._tokens.append(token)
        if self._stop:
            text = self._decode(self._tokens)
            found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
            self._cut = min(found, default=None)
        return self._cut is not None

    def take(self, last: bool) -> str:
        """New text that no later token can change; with `last`, everything that is left."""
        text = self._decode(self._tokens)[: self._cut]
        if not last:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - begun(text, self._stop)]
        new = text[self._given :]
        self._given += len(new)
        return new


def begun(text: str, stops: Items[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of one of these strings."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
