"""A dialogue with a served model. Its messages live here; keys and values are the server's business."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from specexec.pieces import Piece, message_of
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst
from specexec.text.dialogue import Dialogue, before
from specexec.text.messages import Message
from specexec.text.transcript import Kept, belonging

if TYPE_CHECKING:
    from specexec.text.formats.rules import Whole


class Answering(Protocol):
    """What a dialogue needs of a served model."""

    def stream(
        self,
        messages: Items[Message],
        sampling: SamplingParams,
        tools: Items[Message],
        whole: Whole | None,
        proceed: bool = False,
    ) -> Iterator[Burst]: ...

    def rendered(self, messages: Items[Message], tools: Items[Message]) -> str: ...

    def count(self, messages: Items[Message], tools: Items[Message]) -> int: ...


class ServedConversation(Dialogue):
    """Turns of one dialogue, with the promises of specexec/text/conversation.py. Token ids that an engine here wrote
    are kept with the messages that they belong to.
    """

    def __init__(self, writer: Answering, system: str | None = None) -> None:
        super().__init__(system)
        self._writer = writer
        self._cut: tuple[Message, int] | None = None  # an answer that did not end by itself, and its seed

    @property
    def can_proceed(self) -> bool:
        """Whether the last answer was cut short in the middle of what it says, and is the last thing that was said."""
        last = self.messages[-1] if self.messages else None
        return self._cut is not None and last == self._cut[0] and bool(last["content"]) and "tool_calls" not in last

    def proceed(self, sampling: SamplingParams) -> Iterator[Burst]:
        """Go on with an answer that was cut short; nothing if it ended by itself."""
        if not self.can_proceed:
            return
        assert self._cut is not None
        begun, seed = self._cut
        sampling = replace(sampling, seed=seed if sampling.seed is None else sampling.seed)
        bursts = self._writer.stream(self._dialogue, sampling, self.tools, self.whole, proceed=True)
        said = Piece(str(begun["content"]), str(begun.get("reasoning_content", "")))
        yield from self._added(said, bursts)

    @property
    def tokens_used(self) -> int:
        """Context taken by the dialogue so far."""
        return self._count(self._dialogue) if self.messages else 0

    @property
    def rendered(self) -> str:
        """The dialogue as the model would read it next."""
        return self._writer.rendered(self._dialogue, self.tools)

    def keep(self) -> Kept:
        """The dialogue as it is now."""
        return Kept([*self.messages], self.system, belonging(self._turns, self._dialogue), self.left_out)

    def take_up(self, kept: Kept) -> None:
        """Go on where another conversation was kept."""
        self.messages, self.system, self._turns = [*kept.messages], kept.system, [*kept.turns]
        self.left_out = kept.left_out

    def _answer(self, messages: list[Message], sampling: SamplingParams | None) -> Iterator[Burst]:
        self._ask(messages)
        bursts = self._writer.stream(self._read(messages), sampling or SamplingParams(), self.tools, self.whole)
        for burst in bursts:
            if burst.tokens:
                self.messages = [*messages, message_of(Piece())]
                self.unanswered = None
                yield from self._added(Piece(), before(burst, bursts))
                return
            yield burst

    def _count(self, dialogue: list[Message]) -> int:
        return self._writer.count(dialogue, self.tools)

    def _added(self, said: Piece, bursts: Iterator[Burst]) -> Iterator[Burst]:
        """The same bursts; the last message grows with them."""
        self._cut = None
        for burst in bursts:
            said += burst.piece
            self.messages[-1] = message_of(said)
            if burst.finish_reason not in (None, "stop"):
                self._cut = self.messages[-1], burst.seed
            yield burst
