"""The JSON that goes out, in OpenAI's shapes, with draft statistics under the names that llama.cpp gave them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specexec.stats import Burst, Progress

Json = dict[str, object]


@dataclass
class Choice:
    """One text as it grows, and what it took."""

    index: int
    prompt_tokens: int
    echo: str = ""
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    seed: int = 0
    drafted: int = 0
    accepted: int = 0
    sweeps: int = 0
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0

    def add(self, burst: Burst) -> None:
        """Take one more burst."""
        self.last_s = time.monotonic()
        self.first_s = self.last_s if self.first_s is None else self.first_s
        self.text += burst.text
        self.tokens += len(burst.tokens)
        self.finish_reason = burst.finish_reason
        self.seed = burst.seed
        self.drafted += burst.nodes
        self.accepted += burst.accepted
        self.sweeps += bool(burst.tokens)


@dataclass(frozen=True)
class Reply:
    """Everything that stays the same over one answer."""

    chat: bool
    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Choice]) -> Json:
        """The answer to a request that did not ask for a stream."""
        shape = self._message if self.chat else self._completion
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [{**shape(choice), **_ending(choice), "seed": choice.seed} for choice in choices],
            "usage": usage(choices),
            "timings": timings(choices),
        }

    def chunk(self, choice: Choice, text: str, *, role: bool = False, last: bool = False, **more: object) -> Json:
        """One event of a stream: new text of one choice."""
        words: Json
        if self.chat:
            delta = {**({"role": "assistant"} if role else {}), **({"content": text} if text or role else {})}
            words = {"delta": delta}
        else:
            words = {"text": text}
        ending = _ending(choice) if last else {"finish_reason": None, "logprobs": None}
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [{"index": choice.index, **words, **ending}], **more}

    def final(self, choices: list[Choice], *, include_usage: bool) -> Json:
        """The event after the last text: no choices, what it took, and usage if that was asked for."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        used = {"usage": usage(choices)} if include_usage else {}
        return {**head, "choices": [], **used, "timings": timings(choices)}

    def watched(self, **what: object) -> Json:
        """An event for those who watch the machine; it holds no text."""
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [], **what}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @staticmethod
    def _message(choice: Choice) -> Json:
        return {"index": choice.index, "message": {"role": "assistant", "content": choice.text, "refusal": None}}

    @staticmethod
    def _completion(choice: Choice) -> Json:
        return {"index": choice.index, "text": choice.echo + choice.text}


def _ending(choice: Choice) -> Json:
    return {"finish_reason": choice.finish_reason, "logprobs": None}


def usage(choices: list[Choice]) -> Json:
    """Tokens in and out; a prompt counts once however many choices were written for it."""
    prompt = sum({choice.prompt_of: choice.prompt_tokens for choice in map(_Numbered, choices)}.values())
    written = _sum(choice.tokens for choice in choices)
    accepted = _sum(choice.accepted for choice in choices)
    drafted = _sum(choice.drafted for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
