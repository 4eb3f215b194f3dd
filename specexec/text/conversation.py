"""A dialogue: messages, and the keys and values behind them, kept from turn to turn. Knows no terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from specexec.errors import BadMessages
from specexec.model.cache import KVCache
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst
from specexec.text.dialogue import Dialogue, before
from specexec.text.formats.find import Templates, format_of
from specexec.text.formats.format import Format
from specexec.text.messages import Message
from specexec.text.reply import Reply
from specexec.text.template_options import Wishes
from specexec.text.transcript import Kept, Tokens, Turn, begin, belonging, same_text

if TYPE_CHECKING:
    from specexec.sampling.grammar import Grammar

log = logging.getLogger(__name__)


class DialogueEncoding(Tokens, Templates, Protocol):
    """What a dialogue needs of an encoding."""


class DialogueEngine(Protocol):
    """What a dialogue needs of an engine."""

    @property
    def encoding(self) -> DialogueEncoding: ...

    def grammar(self, text: str) -> Grammar: ...

    def filled(self, sampling: SamplingParams | None) -> SamplingParams: ...

    def stream(
        self,
        prompt: list[int],
        sampling: SamplingParams | None,
        caches: dict[object, KVCache] | None,
        written: Items[int],
    ) -> Iterator[Burst]: ...


class Conversation(Dialogue):
    """Turns of one dialogue. An answer that was interrupted stays, as far as it came.

    Messages have OpenAI's shape: an answer's thoughts are its `reasoning_content`, its calls `tool_calls`. Whether the
    model reads them again is its template's business.
    """

    def __init__(self, writer: DialogueEngine, system: str | None = None) -> None:
        super().__init__(system)
        self._writer = writer
        self._caches: dict[object, KVCache] = {}
        self._said: set[str] = set()

    def proceed(self, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Go on with an answer that was cut short, as if it had not been; nothing if it ended by itself."""
        if not self.can_proceed:
            return
        turn, sampling = self._turns[-1], sampling or SamplingParams()
        seed = turn.seed if sampling.seed is None else sampling.seed
        longer = replace(sampling, seed=seed, max_tokens=len(turn.written) + sampling.max_tokens)
        answer = self._reading(turn, sampling)
        turn.ended = None
        bursts = self._writer.stream(turn.prompt, self._bound(turn, longer), self._caches, tuple(turn.written))
        yield from self._added(answer, turn, bursts)

    @property
    def can_proceed(self) -> bool:
        """Whether the last answer is one that was cut short, and the last thing that was said."""
        if not self._turns or self._turns[-1].ended == "stop":
            return False
        turn = self._turns[-1]
        last = len(turn.asked) + 1 == len(self._dialogue) and belonging([turn], self._dialogue) == [turn]
        return last and same_text(self._writer.encoding, turn, self._wishes)

    @property
    def tokens_used(self) -> int:
        """Context taken by the dialogue so far."""
        return self._count(self._dialogue) if self.messages else 0

    @property
    def rendered(self) -> str:
        """The dialogue as the model would read it next."""
        return self._writer.encoding.render(self._dialogue, self._wishes)

    def keep(self) -> Kept:
        """A copy of the dialogue as it is now."""
        turns = [replace(turn, written=[*turn.written]) for turn in belonging(self._turns, self._dialogue)]
        return Kept([*self.messages], self.system, turns, self.left_out)

    def take_up(self, kept: Kept) -> None:
        """Go on where another conversation was kept."""
        self.messages, self.system, self.left_out = [*kept.messages], kept.system, kept.left_out
        self._turns = belonging(kept.turns, kept.dialogue)
        self._caches = {}

    def _answer(self, messages: list[Message], sampling: SamplingParams | None) -> Iterator[Burst]:
        self._ask(messages)
        turn = begin(self._writer.encoding, self._turns, self._read(messages), self._wishes)
        answer = self._reading(turn, sampling)
        bursts = self._writer.stream(turn.prompt, self._bound(turn, sampling), self._caches, ())
        for burst in bursts:
            if burst.tokens:
                said = len(turn.asked)
                self._turns = [*(earlier for earlier in self._turns if len(earlier.asked) < said), turn]
                self.messages = [*messages, {"role": "assistant", "content": ""}]
                self.unanswered = None
                yield from self._added(answer, turn, before(burst, bursts))
                return
            yield burst  # an answer that was stopped before it began is none

    def _count(self, dialogue: list[Message]) -> int:
        return len(self._writer.encoding.encode(dialogue, self._wishes))

    def _reading(self, turn: Turn, sampling: SamplingParams | None) -> Reply:
        stop = self._writer.filled(sampling).stop or ()
        return Reply(self._form, turn.prompt, turn.written, stop)

    def _bound(self, turn: Turn, sampling: SamplingParams | None) -> SamplingParams | None:
        """Calls are written so that they can be read, and texts as they must be. Raises BadMessages, BadGrammar."""
        form = self._form
        if self.tools and not form.calls:
            raise BadMessages(f"tools cannot be called: {form.refusal}.")
        if not (self.whole or (self.tools and form.enforceable)):
            return sampling
        opened = form.reader(turn.prompt).thinking
        bound = form.grammar(self.tools, "auto", whole=self.whole, thought_open=opened)
        for note in bound.notes:
            if note not in self._said:
                self._said.add(note)
                log.warning("%s", note)
        return replace(sampling or SamplingParams(), grammar=self._writer.grammar(bound.text))

    @property
    def _form(self) -> Format:
        return format_of(self._writer.encoding, self._wishes)

    @property
    def _wishes(self) -> Wishes:
        return Wishes(tools=self.tools)

    def _added(self, answer: Reply, turn: Turn, bursts: Iterator[Burst]) -> Iterator[Burst]:
        """The same bursts with their pieces; the last message grows with them."""
        try:
            for burst in bursts:
                piece = answer.add(burst.tokens, last=burst.finish_reason is not None)
                self.messages[-1] = answer.message
                turn.written += burst.tokens
                turn.ended, turn.seed = burst.finish_reason, burst.seed
                yield replace(burst, piece=piece)
        finally:
            if turn.ended is None:  # abandoned: what was held back counts
                answer.add((), last=True)
                self.messages[-1] = answer.message
