"""A dialogue, whatever answers it: messages, a question without an answer yet, what is taken back. Knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from specexec.sampling.params import SamplingParams
from specexec.stats import Burst
from specexec.text.messages import Content, Message, question
from specexec.text.transcript import NOTHING, LeftOut, Turn, dialogue, last_question

if TYPE_CHECKING:
    from specexec.text.formats.rules import Whole


class Dialogue(ABC):
    """Messages of OpenAI's shape. An answer that was interrupted stays, as far as it came.

    `tools` are functions, in OpenAI's shape too, that answers may call; `whole` is what every text must be.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []
        self.tools: tuple[Message, ...] = ()
        self.whole: Whole | None = None
        self.left_out = NOTHING
        self.unanswered: Content | None = None  # a question whose answer did not begin; no message of the dialogue
        self._turns: list[Turn] = []
        self._retries = 0

    def send(self, content: Content, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Ask, and stream the answer. If no token comes, the dialogue stays as it was, the question `unanswered`."""
        self._retries = 0
        return self._answer([*self.messages, question(content)], sampling)

    def go_on(self, results: Items[Message], sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Stream an answer to what the calls of the last one gave: messages of role tool, which stay in any case."""
        self.messages = [*self.messages, *results]
        return self._answer(self.messages, sampling)

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Another answer to the last question: a derived seed, unless the text does not depend on it."""
        if self.unanswered is not None:
            return self.send(self.unanswered, sampling)
        asked = last_question(self.messages)
        if asked is None:
            return iter(())
        if asked < self.left_out.messages:
            self.left_out = NOTHING  # or the question would be left out too
        self._retries += 1
        again = (sampling or SamplingParams()).derived("retry", self._retries)
        return self._answer(self.messages[: asked + 1], again)

    def undo(self) -> bool:
        """Take back the last question and its answer; False if there is none."""
        asked = last_question(self.messages) if self.unanswered is None else len(self.messages)
        if asked is None:
            return False
        self.messages, self.unanswered = self.messages[:asked], None
        if asked <= self.left_out.messages:
            self.left_out = NOTHING  # or nothing would be read any more
        return True

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.messages, self.unanswered, self.left_out = [], None, NOTHING

    def tokens_with(self, more: Items[Message], left_out: LeftOut | None = None) -> int:
        """What the model would read if this were said now, or with this left out instead."""
        return self._count(dialogue(self.system, [*self.messages, *more], left_out or self.left_out))

    def beyond(self, more: Items[Message], room: int) -> int:
        """How many of the oldest messages, by whole turns, have to be left out for more to fit into `room` tokens with
        the others; those that are left out already among them. If nothing fits, all but the turn that goes on with it.
        """
        said = [*self.messages, *more]
        starts = [at for at, message in enumerate(said) if message["role"] == "user" and at > self.left_out.messages]

        def fits(start: int) -> bool:
            return self._count(dialogue(self.system, said[start:])) <= room

        found = bisect_left(starts, True, key=fits)
        return [self.left_out.messages, *starts][min(found + 1, len(starts))]

    def like(self, other: Dialogue) -> None:
        """Offer the tools of another dialogue, and ask for answers of the same shape."""
        self.tools, self.whole = other.tools, other.whole

    @property
    def _dialogue(self) -> list[Message]:
        return self._read(self.messages)

    def _read(self, messages: list[Message]) -> list[Message]:
        """What the model is given of these."""
        return dialogue(self.system, messages, self.left_out)

    @abstractmethod
    def _count(self, dialogue: list[Message]) -> int:
        """Tokens of what the model is given."""

    @abstractmethod
    def _answer(self, messages: list[Message], sampling: SamplingParams | None) -> Iterator[Burst]:
        """Stream an answer to the last of these."""

    def _ask(self, messages: list[Message]) -> None:
        """The last of these has no answer yet, unless it is part of the dialogue already."""
        if messages != self.messages[: len(messages)]:
            asked = messages[-1]["content"]
            self.unanswered = asked if isinstance(asked, list) else str(asked)


def before(first: Burst, rest: Iterator[Burst]) -> Iterator[Burst]:
    """All of these."""
    yield first
    yield from rest
