"""An answer in Anthropic's shapes: a message of content blocks, whole or as the events that build it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator

from cli.messages_api.errors import error_body
from cli.openai.choice import Choice, News
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json
from cli.openai.reply import Prompted, Standing, StreamEvent
from specexec.text.formats import Call, Piece


class MessagesReply:
    """One message. A request with a larger `max_tokens` than the context leaves room for ends there, which is said."""

    def __init__(self, max_tokens: int, prompted: Prompted) -> None:
        self._max_tokens = max_tokens
        self._prompted = prompted
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks = Blocks()

    def whole(self, choices: list[Choice]) -> Json:
        (choice,) = choices
        blocks = Blocks()
        for piece in choice.pieces:
            list(blocks.add(piece))
        list(blocks.close())
        return {**self._message(blocks.closed, self._usage(choice)), **self._ending(choice)}

    def opening(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        usage: Json = {"input_tokens": self._prompted.tokens, "output_tokens": 0}
        yield _event("message_start", message=self._message([], usage))
        yield _event("ping")

    def more(self, choice: Choice, news: News) -> Iterator[StreamEvent]:
        return self._blocks.add(news.piece)

    def closing(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        (choice,) = choices
        yield from self._blocks.close()
        yield _event("message_delta", delta=self._ending(choice), usage=self._usage(choice))
        yield _event("message_stop")

    def failing(self, error: ApiError) -> Iterator[StreamEvent]:
        yield StreamEvent(error_body(error), "error")

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        return _event("ping")

    def _message(self, content: list[Json], usage: Json) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._prompted.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _ending(self, choice: Choice) -> Json:
        return {"stop_reason": self._reason(choice), "stop_sequence": choice.stop_text}

    def _reason(self, choice: Choice) -> str:
        match choice.finish_reason:
            case "tool_calls":
                return "tool_use"
            case "length":
                return "max_tokens" if choice.tokens >= self._max_tokens else "model_context_window_exceeded"
        return "end_turn" if choice.stop_text is None else "stop_sequence"

    def _usage(self, choice: Choice) -> Json:
        cached = choice.cached or 0
        return {
            "input_tokens": self._prompted.tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": choice.tokens,
        }


class Blocks:
    """Content blocks as pieces come: what follows of the same kind goes on with the open one. `closed` are whole."""

    def __init__(self) -> None:
        self.closed: list[Json] = []
        self._kind = ""  # of the open block: text or thinking
        self._text = ""

    def add(self, piece: Piece) -> Iterator[StreamEvent]:
        """The events of one more piece."""
        yield from self._say("thinking", piece.reasoning)
        yield from self._say("text", piece.content)
        for call in piece.calls:
            yield from self._call(call)

    def close(self) -> Iterator[StreamEvent]:
        """The end of the open block, if there is one."""
        kind, text = self._kind, self._text
        self._kind = self._text = ""
        if not kind:
            return
        block: Json = {"type": kind, kind: text}
        if kind == "thinking":
            block["signature"] = _signature(text)
            yield self._delta("signature_delta", "signature", _signature(text))
        yield from self._end(block)

    def _say(self, kind: str, text: str) -> Iterator[StreamEvent]:
        if not text:
            return
        if kind != self._kind:
            yield from self.close()
            self._kind = kind
            signed = {"signature": ""} if kind == "thinking" else {}
            yield self._start({"type": kind, kind: "", **signed})
        self._text += text
        yield self._delta(f"{kind}_delta", kind, text)

    def _call(self, call: Call) -> Iterator[StreamEvent]:
        yield from self.close()
        block: Json = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        yield self._start(block)
        yield self._delta("input_json_delta", "partial_json", call.arguments)
        yield from self._end({**block, "input": json.loads(call.arguments)})

    def _start(self, block: Json) -> StreamEvent:
        return _event("content_block_start", index=len(self.closed), content_block=block)

    def _delta(self, kind: str, name: str, value: str) -> StreamEvent:
        return _event("content_block_delta", index=len(self.closed), delta={"type": kind, name: value})

    def _end(self, block: Json) -> Iterator[StreamEvent]:
        yield _event("content_block_stop", index=len(self.closed))
        self.closed.append(block)


def _event(name: str, **more: object) -> StreamEvent:
    return StreamEvent({"type": name, **more}, name)


def _signature(thought: str) -> str:
    """A thought's SHA-256: clients drop a thought without a signature. It is not looked at when it comes back."""
    return hashlib.sha256(thought.encode()).hexdigest()
