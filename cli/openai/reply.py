"""What every protocol of the server says of an answer: the events of a stream, and the whole. Knows no wire format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cli.openai.choice import Choice, News
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json
from cli.openai.parse import HttpRequest

if TYPE_CHECKING:
    from specexec.stats import Progress


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream, with a name where the protocol has names; without data it is a comment."""

    data: Json | str | None = None
    name: str | None = None
    comment: str | None = None


@dataclass(frozen=True)
class Standing:
    """Where an answer is while nothing of it comes: with `ahead` texts before it in the line, or in its sweep."""

    ahead: int
    progress: Progress

    @property
    def words(self) -> str:
        now = self.progress
        return f"waiting, {self.ahead} in line" if self.ahead else f"sweep {now.sweeps}, layer {now.layer}/{now.layers}"


@dataclass(frozen=True)
class Prompted:
    """What is known once the prompts are read: the model's name for this client, and how many tokens they have.

    `decode` turns ids into text, `count` says how many tokens a text has. `lossy` names what changes texts here.
    """

    model: str
    tokens: int
    decode: Callable[[list[int]], str]
    count: Callable[[str], int]
    lossy: tuple[str, ...] = ()


class ProtocolReply(Protocol):
    """One answer in the words of one protocol. `more` is called with every burst, also if it has no news."""

    def whole(self, choices: list[Choice]) -> Json:
        """The answer to a request that did not ask for a stream."""

    def opening(self, choices: list[Choice]) -> Iterable[StreamEvent]:
        """What a stream begins with."""

    def more(self, choice: Choice, news: News) -> Iterable[StreamEvent]:
        """What one burst brought; it was the last of its choice if that has a `finish_reason`."""

    def closing(self, choices: list[Choice]) -> Iterable[StreamEvent]:
        """What a stream ends with."""

    def failing(self, error: ApiError) -> Iterable[StreamEvent]:
        """What a stream ends with that cannot go on."""

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        """What a silent stream sends from time to time; a comment only if the client counts `comments` as life."""


@dataclass(frozen=True)
class Exchange:
    """A request that was read, and how to reply to it."""

    asked: HttpRequest
    reply: Callable[[Prompted], ProtocolReply]
