"""Log-probabilities as OpenAI's clients expect them: one shape for chats, an older one for plain completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specexec.stats import Logprob

Json = dict[str, object]
Piece = Callable[[int | None, int], str]


@dataclass(frozen=True)
class PieceLogprob:
    """One token as text; the first of a prompt has no probability."""

    text: str
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


class LogprobReader:
    """The engine's log-probabilities with the text of each token, in the order in which they come.

    With `echo` the prompt is included, from its first token on; without, the answer after the prompt's last token.
    """

    def __init__(self, piece: Piece, prompt: list[int], echo: bool) -> None:
        self._piece = piece
        self._before = prompt[0 if echo else -1]
        self._opening = [PieceLogprob(piece(None, prompt[0]))] if echo else []

    def read(self, entries: Iterable[Logprob]) -> list[PieceLogprob]:
        """The next tokens of the text."""
        logprobs, self._opening = self._opening, []
        for entry in entries:
            top = tuple((self._piece(self._before, token), value) for token, value in entry.top)
            logprobs.append(PieceLogprob(self._piece(self._before, entry.token), entry.logprob, top))
            self._before = entry.token
        return logprobs


def for_chat(logprobs: list[PieceLogprob]) -> Json:
    """`choices[].logprobs` of a chat completion."""
    return {
        "content": [
            {**_entry(one.text, one.logprob), "top_logprobs": [_entry(text, value) for text, value in one.top]}
            for one in logprobs
        ],
        "refusal": None,
    }


def for_completion(logprobs: list[PieceLogprob], offset: int) -> Json:
    """`choices[].logprobs` of a completion; `offset` is where the first token begins in the choice's text."""
    offsets = accumulate((len(one.text) for one in logprobs), initial=offset)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [_table(one) for one in logprobs],
        "text_offset": [start for start, _ in zip(offsets, logprobs, strict=False)],
    }


def _entry(text: str, logprob: float | None) -> Json:
    # A token may be a part of a character: its bytes are not known here, and null says so.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _table(one: PieceLogprob) -> dict[str, float] | None:
    """The likeliest tokens and the one that came; two that look alike count as the likelier one."""
    if one.logprob is None:
        return None
    table: dict[str, float] = {}
    for text, value in (*one.top, (one.text, one.logprob)):
        table[text] = max(value, table.get(text, value))
    return table
