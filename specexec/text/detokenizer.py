"""Tokens into text, burst by burst: whole characters only, and never a part of a stop string. Knows no tokenizer.

A decoder is asked about a few tokens at a time: those since the text was last *settled*, after the few that settled it
then. Text is settled when no later token can change it: it does not end in the middle of a character, nor in one of
the single bytes that SentencePiece writes unknown characters in, which are judged as one run when the run has ended.
So the cost is linear, and the pieces add up to what decoding everything at once gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Items

INCOMPLETE = "\ufffd"  # how a decoder shows the bytes of an unfinished character


class TextStream:
    """The growing text of one answer. The parts `take` returns add up to the decoded answer, cut at a stop string.

    `single_bytes` are the tokens of SentencePiece's bytes, `before` tokens that the answer follows: a decoder that
    leaves out the blank at the beginning of a text then keeps it. `stopped_by` is the stop string that has come.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Items[str] = (),
        single_bytes: Collection[int] = (),
        before: Items[int] = (),
    ) -> None:
        self._decode, self._stop, self._single_bytes = decode, tuple(stop), single_bytes
        self._window = list(before)  # tokens that settled the text last, and those since
        self._known = len(before)  # how many of them had settled it
        self._text = decode(self._window) if before else ""  # of the window
        self._head = len(self._text)  # its characters that are settled
        self._ready = ""  # settled, and not given yet
        self._cut: int | None = None  # where a stop string begins in what is not given yet
        self.stopped_by: str | None = None

    def add(self, token: int) -> bool:
        """Append a token; True if the text now holds a stop string."""
        text = self._decode([*self._window, token])
        if text == self._text and text and not text.endswith(INCOMPLETE):
            return self._cut is not None  # a control token, which decoders skip
        self._window.append(token)
        self._text = text
        new = self._ready + text[self._head :]
        found = [(at, stop) for stop in self._stop if (at := new.find(stop)) >= 0]
        self._cut, self.stopped_by = min(found, default=(None, None))
        if not (text.endswith(INCOMPLETE) or token in self._single_bytes):
            self._settle()
        return self._cut is not None

    def take(self, last: bool) -> str:
        """New text that no later token can change; with `last`, everything that is left."""
        tail = self._text[self._head :] if last else ""
        text = (self._ready + tail)[: self._cut]
        if last:
            self._head = len(self._text)
        else:
            text = text[: len(text) - begun(text, self._stop)]
        self._ready = self._ready[len(text) :]
        self._cut = None if self._cut is None else self._cut - len(text)
        return text

    def _settle(self) -> None:
        self._ready += self._text[self._head :]
        self._head = len(self._text)
        newest = self._window[self._known :]
        if text := self._decode(newest):  # else a lone blank, which says nothing at the beginning of a text
            self._window, self._known, self._text, self._head = newest, len(newest), text, len(text)


def begun(text: str, stops: Items[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of one of these strings."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
