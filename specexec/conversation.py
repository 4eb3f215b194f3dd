"""A dialogue: messages, and the keys and values behind them, kept from turn to turn. Knows no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Protocol, TypeAlias

from specexec.cache import KVCache
from specexec.noise import derived_seed
from specexec.sampling import SamplingParams
from specexec.stats import Burst

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Items[int] | Items[Message]  # raw text, token ids, or messages for the chat template


class Writer(Protocol):
    """What a dialogue needs of an engine."""

    def encode(self, prompt: list[Message]) -> list[int]: ...

    def stream(
        self, prompt: list[Message], sampling: SamplingParams | None, caches: dict[object, KVCache] | None
    ) -> Iterator[Burst]: ...


class Conversation:
    """Turns of one dialogue. An answer that was interrupted stays, as far as it came."""

    def __init__(self, writer: Writer, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []
        self._writer = writer
        self._caches: dict[object, KVCache] = {}
        self._retries = 0

    def send(self, text: str, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Ask, and stream the answer. If the engine refuses the question, the dialogue is as it was."""
        self._retries = 0
        return self._answer([*self.messages, {"role": "user", "content": text}], sampling)

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Burst]:
        """Another answer to the last question: a derived seed, unless the text does not depend on it."""
        asked = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if asked is None:
            return iter(())
        sampling = sampling or SamplingParams()
        self._retries += 1
        if sampling.seed is not None:
            sampling = replace(sampling, seed=derived_seed(sampling.seed, "retry", self._retries))
        return self._answer(self.messages[: asked + 1], sampling)

    def undo(self) -> bool:
        """Take back the last question and its answer; False if there is none."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if asked:
            del self.messages[asked[-1] :]
        return bool(asked)

    def clear(self) -> None:
        """Start anew; the system prompt stays."""
        self.messages.clear()

    @property
    def tokens_used(self) -> int:
        """Context taken by the dialogue so far."""
        return len(self._writer.encode(self._with_system(self.messages))) if self.messages else 0

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def _answer(self, messages: list[Message], sampling: SamplingParams | None) -> Iterator[Burst]:
        bursts = self._writer.stream(self._with_system(messages), sampling, self._caches)
        self.messages = messages
        answer: Message = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        for burst in bursts:
            answer["content"] += burst.text
            yield burst
