"""One answer as it is read: its pieces, separated as its family writes them, and the message they add up to."""

from __future__ import annotations

from collections.abc import Sequence as Items

from specexec.pieces import Piece, message_of
from specexec.text.formats.format import Format


class Reply:
    """Follows the answer to `prompt`; `written` is what an earlier run, which was cut short, has given out of it.

    The message is what it would be without the cut, also where a mark or a blank was in the middle of it.
    """

    def __init__(self, form: Format, prompt: Items[int], written: Items[int] = (), stop: Items[str] = ()) -> None:
        self._reader = form.reader(prompt, (), stop)
        self._whole = self._reader.read(written, last=False)
        self._seen = form.reader(prompt, (), stop).read(written, last=True)

    def add(self, tokens: Items[int], last: bool) -> Piece:
        """What these tokens add to what was given out before."""
        before, piece = self._whole, self._reader.read(tokens, last)
        self._whole += piece
        return Piece(
            _new(before.content, piece.content, self._seen.content),
            _new(before.reasoning, piece.reasoning, self._seen.reasoning),
            piece.calls,
        )

    @property
    def message(self) -> dict[str, object]:
        """The answer so far, in OpenAI's shape."""
        return message_of(self._whole)


def _new(before: str, piece: str, seen: str) -> str:
    whole = before + piece
    if not (whole.startswith(seen) or seen.startswith(whole)):  # what looked like text was the beginning of a mark
        return piece
    return whole[max(len(before), len(seen)) :]
