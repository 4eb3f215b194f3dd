"""The JSON that goes out, in OpenAI's shapes, with draft statistics under llama.cpp's names."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from cli.openai.choice import Choice, News
from cli.openai.logprobs import Json, PieceLogprob, for_chat, for_completion
from specexec.text.formats import Call

if TYPE_CHECKING:
    from specexec.stats import Burst, Progress


@dataclass(frozen=True)
class ApiReply:
    """Everything that stays the same over one answer."""

    chat: bool
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    lossy: tuple[str, ...] = ()

    def whole(self, choices: list[Choice]) -> Json:
        """The answer to a request that did not ask for a stream."""
        shaped = [
            {
                "index": choice.index,
                **self._words(choice),
                "finish_reason": choice.finish_reason,
                "logprobs": self._likely(choice, choice.logprobs, 0),
                "seed": choice.seed,
            }
            for choice in choices
        ]
        head = self._head("chat.completion" if self.chat else "text_completion")
        return {**head, "choices": shaped, "usage": self.usage(choices), "timings": self.timings(choices)}

    def opening(self, choice: Choice) -> Json:
        """The first event of one choice: who speaks, or the prompt that was to be echoed."""
        if self.chat:
            return self._chunk({"index": choice.index, "delta": {"role": "assistant", "content": ""}, **_OPEN})
        return self._chunk({"index": choice.index, "text": choice.echo, **_OPEN})

    def more(self, choice: Choice, news: News) -> Json:
        """What is new in one choice."""
        piece = news.piece
        delta = _reasoned(piece.reasoning)
        if piece.content or not (piece.reasoning or piece.calls):
            delta["content"] = piece.content
        if piece.calls:
            delta["tool_calls"] = [{"index": news.first + at, **_called(call)} for at, call in enumerate(piece.calls)]
        words: Json = {"delta": delta} if self.chat else {"text": piece.content}
        likely = self._likely(choice, news.logprobs, news.offset)
        return self._chunk({"index": choice.index, **words, "finish_reason": None, "logprobs": likely})

    def ending(self, choice: Choice) -> Json:
        """The last event of one choice: why it ended, and the seed that gives it again."""
        words: Json = {"delta": {}} if self.chat else {"text": ""}
        ended = self._chunk(
            {
                "index": choice.index,
                **words,
                "finish_reason": choice.finish_reason,
                "logprobs": None,
                "seed": choice.seed,
            }
        )
        return {**ended, "timings": self.timings([choice])}

    def used(self, choices: list[Choice]) -> Json:
        """The event after the last text, for those who asked for usage."""
        return {**self._chunk(), "usage": self.usage(choices), "timings": self.timings(choices)}

    def watched(self, **what: object) -> Json:
        """An event for those who watch the machine; it holds no text."""
        return {**self._chunk(), "specexec": what}

    def usage(self, choices: list[Choice]) -> Json:
        """Tokens in and out; a prompt counts once, however many choices were written for it."""
        written = sum(choice.tokens for choice in choices)
        accepted = sum(choice.accepted for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            **_cached(choices),
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(choice.drafted for choice in choices) - accepted,
            },
        }

    def timings(self, choices: list[Choice]) -> Json:
        """Speed and drafting. The first sweep reads the prompt and gives the first tokens: it counts as prompt time."""
        first_s = max((choice.first_s or choice.began_s) - choice.began_s for choice in choices)
        whole_s = max(choice.last_s - choice.began_s for choice in choices)
        written = sum(choice.tokens for choice in choices)
        return {
            "prompt_n": self.prompt_tokens,
            "prompt_ms": round(1000 * first_s, 3),
            "predicted_n": written,
            "predicted_ms": round(1000 * (whole_s - first_s), 3),
            "predicted_per_second": round(written / max(whole_s, 1e-9), 3),
            "draft_n": sum(choice.drafted for choice in choices),
            "draft_n_accepted": sum(choice.accepted for choice in choices),
            "draft_n_verif_steps": sum(choice.sweeps for choice in choices),
        }

    def _words(self, choice: Choice) -> Json:
        if not self.chat:
            return {"text": choice.echo + choice.piece.content}
        piece = choice.piece
        message: Json = {"role": "assistant", "content": piece.content, "refusal": None, **_reasoned(piece.reasoning)}
        if piece.calls:
            message |= {"content": piece.content or None, "tool_calls": [_called(call) for call in piece.calls]}
        return {"message": message}

    def _likely(self, choice: Choice, logprobs: list[PieceLogprob], offset: int) -> Json | None:
        if choice.logprob_reader is None:
            return None
        return for_chat(logprobs) if self.chat else for_completion(logprobs, offset)

    def _chunk(self, *choices: Json) -> Json:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": list(choices)}

    def _head(self, kind: str) -> Json:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": "-".join(
                [f"specexec-{version('specexec')}", *(f"lossy-{one}" for one in self.lossy)]
            ),
        }


def _cached(choices: list[Choice]) -> Json:
    known = [choice.cached for choice in choices if choice.cached is not None]
    return {"prompt_tokens_details": {"cached_tokens": sum(known)}} if known else {}


_OPEN: Json = {"finish_reason": None, "logprobs": None}


def _reasoned(text: str) -> Json:
    """A thought under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _called(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def picture(burst: Burst, decode: Callable[[list[int]], str]) -> Json:
    """One sweep for a watcher, after the text that it gave: the tree of guesses as words and ids, with its chances, the
    path that became text, the target's own word, and how the text ended if it has.
    """
    tree = burst.tree
    return {
        "words": [decode([token]) for token in tree.tokens],
        "parents": tree.parents,
        "path": list(burst.path),
        "own": [decode([token]) for token in burst.tokens[len(burst.path) :]],
        "guessed": tree.tokens,
        "reach": tree.reach_N.tolist(),
        "origin": tree.origin_N.tolist(),
        "tokens": list(burst.tokens),
        "sweep_s": burst.sweep_s,
        "draft_s": burst.draft_s,
        "bytes_read": burst.bytes_read,
        "finish_reason": burst.finish_reason,
        "limit": burst.limit,
        "seed": burst.seed,
        "replaced": burst.replaced,
        "unread": burst.unread,
        "kv_dropped": burst.kv_dropped,
    }


def place(progress: Progress) -> Json:
    """How far the running sweep is, for a watcher."""
    return {
        "layer": progress.layer,
        "layers": progress.layers,
        "sweep": progress.sweeps,
        "bytes_read": progress.bytes_read,
    }
