"""A dialogue: messages, and the keys and values behind them, kept from turn to turn. Knows no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

from specexec.cache import KVCache
from specexec.sampling import SamplingParams
from specexec.stats import Burst
from specexec.transcript import Message, Tokens, Turn, begin

CUE = 8  # tokens; templates end with a role and at most the beginning of a thought


class Writer(Protocol):
    """What a dialogue needs of an engine."""

    @property
    def encoding(self) -> Tokens: ...

    @property
    def models(self) -> dict[str, object]: ...

    def stream(
        self,
        prompt: list[int],
        sampling: SamplingParams | None,
        caches: dict[object, KVCache] | None,
        written: Items[int],
    ) -> Iterator[Burst]: ...


@dataclass
class Kept:
    """A dialogue at rest: enough to go on with it, in this process or in another, and read nothing twice."""

    messages: list[Message]
    system: str | None
    turns: list[Turn]  # the last one, which holds all the tokens of those before it
    caches: dict[str, KVCache]  # by the model's role: target, drafter, drafter-2, …


class Conversation:
    """Turns of one dialogue. An answer that was interrupted stays, as far as it came."""

    def __init__(self, writer: Writer, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []
        self.unanswered: str | None = None  # a question whose answer did not begin; no message of the dialogue
        self._writer = writer
        self._caches: dict[object, KVCache] = {}
        self._turns: list[Turn] = []
        self._retries = 0

    def send(self, text: str, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Ask, and stream the answer. If no token comes, the dialogue stays as it was, the question `unanswered`."""
        self._retries = 0
        return self._answer([*self.messages, {"role": "user", "content": text}], sampling)

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Another answer to the last question: a derived seed, unless the text does not depend on it."""
        if self.unanswered is not None:
            return self.send(self.unanswered, sampling)
        asked = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if asked is None:
            return iter(())
        self._retries += 1
        again = (sampling or SamplingParams()).derived("retry", self._retries)
        return self._answer(self.messages[: asked + 1], again)

    def proceed(self, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Go on with an answer that was cut short, as if it had not been; nothing if it ended by itself."""
        if not self.can_proceed:
            return
        turn, sampling = self._turns[-1], sampling or SamplingParams()
        seed = turn.seed if sampling.seed is None else sampling.seed
        longer = replace(sampling, seed=seed, max_tokens=len(turn.written) + sampling.max_tokens)
        turn.ended = None
        for burst in self._writer.stream(turn.prompt, longer, self._caches, tuple(turn.written)):
            self._add(burst)
            yield burst

    @property
    def can_proceed(self) -> bool:
        """Whether the last answer is one that was cut short, and the last thing that was said."""
        last = bool(self.messages) and self.messages[-1]["role"] == "assistant" and bool(self._turns)
        cut = last and self._turns[-1].ended != "stop"
        return cut and self._with_system(self.messages[:-1]) == self._turns[-1].asked

    def undo(self) -> bool:
        """Take back the last question and its answer; False if there is none."""
        if self.unanswered is not None:
            self.unanswered = None
            return True
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if asked:
            del self.messages[asked[-1] :]
        return bool(asked)

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.messages, self.unanswered = [], None

    @property
    def tokens_used(self) -> int:
        """Context taken by the dialogue so far."""
        return len(self._writer.encoding.encode(self._with_system(self.messages))) if self.messages else 0

    @property
    def rendered(self) -> str:
        """The dialogue as the model would read it next."""
        return self._writer.encoding.render(self._with_system(self.messages))

    @property
    def cue(self) -> str:
        """What the last answer went on from: the end of its prompt as the template made it, special tokens too."""
        last = self._turns[-1].prompt[-CUE:] if self._turns else []
        return "".join(self._writer.encoding.spell(token) for token in last)

    def keep(self) -> Kept:
        """The dialogue as it stands; a copy as far as messages go, the caches themselves."""
        roles = {id(lm): role for role, lm in self._writer.models.items()}
        caches = {roles[id(lm)]: cache for lm, cache in self._caches.items() if id(lm) in roles}
        return Kept([*self.messages], self.system, self._turns[-1:], caches)

    def take_up(self, kept: Kept) -> None:
        """Go on where another conversation was kept."""
        self.messages, self.system = [*kept.messages], kept.system
        self._turns = [*kept.turns]
        models = self._writer.models
        self._caches = {models[role]: cache for role, cache in kept.caches.items() if role in models}

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def _answer(self, messages: list[Message], sampling: SamplingParams | None) -> Iterator[Burst]:
        if messages != self.messages[: len(messages)]:
            self.unanswered = messages[-1]["content"]
        turn = begin(self._writer.encoding, self._turns, self._with_system(messages))
        for burst in self._writer.stream(turn.prompt, sampling, self._caches, ()):
            if burst.tokens and not turn.written:  # an answer that was stopped before it began is none
                self._begin(turn, messages)
            if turn.written or burst.tokens:
                self._add(burst)
            yield burst

    def _begin(self, turn: Turn, messages: list[Message]) -> None:
        self._turns = [*(earlier for earlier in self._turns if len(earlier.asked) < len(turn.asked)), turn]
        self.messages = [*messages, {"role": "assistant", "content": ""}]
        self.unanswered = None

    def _add(self, burst: Burst) -> None:
        turn = self._turns[-1]
        self.messages[-1]["content"] += burst.text
        turn.written += burst.tokens
        turn.ended, turn.seed = burst.finish_reason, burst.seed
