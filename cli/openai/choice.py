"""One text as it grows: its pieces, burst by burst, and what it took. Knows no protocol's shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cli.openai.logprobs import LogprobReader, PieceLogprob
from specexec.text.formats import Piece, Reader

if TYPE_CHECKING:
    from specexec.stats import Burst


@dataclass(frozen=True)
class News:
    """What one burst added to a choice; `first` calls and `offset` characters of tokens were there before."""

    piece: Piece = field(default_factory=Piece)
    logprobs: list[PieceLogprob] = field(default_factory=list)
    first: int = 0
    offset: int = 0
    burst: Burst | None = None

    def __bool__(self) -> bool:
        return bool(self.piece != Piece() or self.logprobs)


@dataclass
class Choice:
    """One text as it grows, and what it took.

    `reader` splits off thoughts and calls, if that is wanted; `logprob_reader` adds log-probabilities, likewise.
    `silent` are tokens that end a text and are not shown; `limit` is what ended it for its length, `stop_text` the stop
    string that did. `pieces` add up to `piece`. It is the `first` of its prompt, of which `cached` tokens
    needed no computing; None where that is not known, or was said for the first.
    """

    index: int
    echo: str = ""
    reader: Reader | None = None
    logprob_reader: LogprobReader | None = None
    silent: tuple[int, ...] = ()
    first: bool = True
    logprobs: list[PieceLogprob] = field(default_factory=list)
    piece: Piece = field(default_factory=Piece)
    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None
    limit: str | None = None
    stop_text: str | None = None
    cached: int | None = None
    seed: int = 0
    drafted: int = 0
    accepted: int = 0
    sweeps: int = 0
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    _offset: int = 0

    def add(self, burst: Burst) -> News:
        """Take one more burst, and say what is new in it."""
        self.last_s = time.monotonic()
        self.first_s = self.last_s if self.first_s is None else self.first_s
        entries = (*burst.prompt_logprobs, *burst.logprobs)
        logprobs = [] if self.logprob_reader is None else self.logprob_reader.read(entries)
        last = burst.finish_reason is not None
        ended = last and burst.tokens[-1:] != () and burst.tokens[-1] in self.silent
        shown = burst.tokens[:-1] if ended else burst.tokens
        piece = Piece(burst.text) if self.reader is None else self.reader.read(shown, last)
        news = News(piece, logprobs, len(self.piece.calls), self._offset, burst)
        self.piece += piece
        self.pieces.append(piece)
        self._offset += sum(len(one.text) for one in logprobs)
        self.logprobs += logprobs
        self.tokens += len(burst.tokens)
        called = burst.finish_reason == "stop" and self.piece.calls
        self.finish_reason = "tool_calls" if called else burst.finish_reason
        self.limit, self.stop_text = burst.limit, burst.stop_text
        self.seed = burst.seed
        self.drafted += burst.nodes
        self.accepted += burst.accepted
        self.sweeps += bool(burst.tokens)
        return news


NOTHING = News()
