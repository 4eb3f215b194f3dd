"""Plain completion with the interface of a conversation, so that chat and repl share everything else."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from specexec.sampling.params import SamplingParams
from specexec.text.messages import Content, Message
from specexec.text.transcript import NOTHING, LeftOut

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.stats import Burst


@dataclass
class RawConversation:
    """Every line is a prompt of its own: no template, no memory of earlier lines."""

    engine: Engine
    system: str | None = None
    messages: list[dict[str, object]] = field(default_factory=list)
    unanswered: str | None = None
    left_out: LeftOut = NOTHING  # no earlier line is read in any case
    rendered: str = ""  # the last prompt and its completion, as written
    _retries: int = 0

    def send(self, text: Content, sampling: SamplingParams) -> Iterator[Burst]:
        """Continue `text`; what was written is kept, also when it is interrupted."""
        from specexec.text.formats import format_of
        from specexec.text.reply import Reply

        assert isinstance(text, str), "images are for chat"
        self.unanswered = text
        stop = self.engine.filled(sampling).stop or ()
        reply = Reply(format_of(self.engine.encoding), self.engine.encode(text), (), stop)
        for burst in self.engine.stream(text, sampling):
            if burst.tokens and self.unanswered is not None:
                self.messages += [{"role": "prompt", "content": text}, {}]
                self.unanswered, self.rendered = None, text
            piece = reply.add(burst.tokens, last=burst.finish_reason is not None)
            if self.unanswered is None:
                self.rendered += burst.text
                self.messages[-1] = {**reply.message, "role": "completion"}
            yield replace(burst, piece=piece)

    def retry(self, sampling: SamplingParams) -> Iterator[Burst]:
        """Continue the last prompt again, with a derived seed."""
        if self.unanswered is not None:
            return self.send(self.unanswered, sampling)
        text = str(self.messages[-2]["content"])
        self.undo()
        self._retries += 1
        return self.send(text, sampling.derived("retry", self._retries))

    def go_on(self, results: Items[Message], sampling: SamplingParams) -> Iterator[Burst]:
        """Nothing: what is completed calls no tools."""
        return iter(())

    @property
    def can_proceed(self) -> bool:
        """A completion is continued by typing it again."""
        return False

    def proceed(self, sampling: SamplingParams) -> Iterator[Burst]:
        """Nothing."""
        return iter(())

    def undo(self) -> bool:
        """Forget the last prompt and its completion."""
        if self.unanswered is not None:
            self.unanswered = None
            return True
        undone = bool(self.messages)
        del self.messages[-2:]
        self.rendered = ""
        return undone

    def clear(self) -> None:
        """Forget all of them."""
        self.messages.clear()
        self.unanswered, self.rendered = None, ""

    @property
    def tokens_used(self) -> int:
        """Tokens of the last prompt and its completion."""
        return len(self.engine.encode(self.rendered))
