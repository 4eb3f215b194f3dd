"""An answer in the shapes of OpenAI's Responses: output items, whole or as the events that build them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from cli.openai.choice import Choice, News
from cli.openai.errors import ApiError
from cli.openai.logprobs import Json
from cli.openai.parse import Message
from cli.openai.reply import Prompted, Standing, StreamEvent
from cli.responses_api.schema import ResponsesRequest
from cli.responses_api.store import ResponseStore, StoredResponse
from specexec.pieces import message_of
from specexec.text.formats import Call, Piece


class ResponsesReply:
    """One response; it is kept in `store` once it is whole, with the conversation that it answers."""

    def __init__(
        self, request: ResponsesRequest, conversation: list[Message], store: ResponseStore | None, prompted: Prompted
    ) -> None:
        self._request, self._conversation, self._store, self._prompted = request, conversation, store, prompted
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = time.time()
        self._sent = 0  # events
        self._items = OutputItems(self._event, bool(request.reasoning and request.reasoning.summary))

    def whole(self, choices: list[Choice]) -> Json:
        (choice,) = choices
        for piece in choice.pieces:
            list(self._items.add(piece))
        list(self._items.close(self._status(choice)))
        return self._finished(choice)

    def opening(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def more(self, choice: Choice, news: News) -> Iterator[StreamEvent]:
        return self._items.add(news.piece)

    def closing(self, choices: list[Choice]) -> Iterator[StreamEvent]:
        (choice,) = choices
        status = self._status(choice)
        yield from self._items.close(status)
        yield self._event(f"response.{status}", response=self._finished(choice))

    def failing(self, error: ApiError) -> Iterator[StreamEvent]:
        reason = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}
        yield self._event("response.failed", response=self._response("failed", error=reason))

    def alive(self, standing: Standing, unfinished: list[Choice], comments: bool) -> StreamEvent:
        return StreamEvent(comment=standing.words)  # every event has a number and a meaning; none of them says nothing

    def _event(self, name: str, /, **more: object) -> StreamEvent:
        self._sent += 1
        return StreamEvent({"type": name, "sequence_number": self._sent - 1, **more}, name)

    def _finished(self, choice: Choice) -> Json:
        status = self._status(choice)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = self._usage(choice)
        body = self._response(status, incomplete_details=cut, usage=usage, completed_at=time.time(), seed=choice.seed)
        if self._store is not None:
            self._store.put(StoredResponse(body, [*self._conversation, message_of(choice.piece)]))
        return body

    def _status(self, choice: Choice) -> str:
        return "incomplete" if choice.finish_reason == "length" else "completed"

    def _response(self, status: str, **more: object) -> Json:
        asked = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._prompted.model,
            "output": [*self._items.closed],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **_given(asked.reasoning)},
            "store": self._store is not None,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}, **_given(asked.text)},
            "tool_choice": choice if isinstance(choice := asked.tool_choice or "auto", str) else _given(choice),
            "tools": [tool for tool in asked.tools or [] if tool.get("type") == "function"],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def _usage(self, choice: Choice) -> Json:
        return {
            "input_tokens": self._prompted.tokens,
            "input_tokens_details": {"cached_tokens": choice.cached or 0, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": self._prompted.count(choice.piece.reasoning)},
            "total_tokens": self._prompted.tokens + choice.tokens,
        }


@dataclass(frozen=True)
class _Texts:
    """How the text of an item is sent: the item's field, its part's type, and the names of the events."""

    field: str
    part: str
    event: str
    part_event: str

    def of(self, text: str) -> Json:
        """The part that holds this text."""
        more: Json = {"annotations": [], "logprobs": []} if self is _ANSWER else {}
        return {"type": self.part, "text": text, **more}


_ANSWER = _Texts("content", "output_text", "output_text", "content_part")
_THOUGHT = _Texts("content", "reasoning_text", "reasoning_text", "content_part")
_SUMMARY = _Texts("summary", "summary_text", "reasoning_summary_text", "reasoning_summary_part")


class OutputItems:
    """Output items as pieces come: text of the same kind goes on with the open item. `closed` are whole.

    Where a summary of thoughts is wanted, it is the thoughts themselves.
    """

    def __init__(self, event: Callable[..., StreamEvent], summarised: bool) -> None:
        self.closed: list[Json] = []
        self._event = event
        self._texts = {"message": _ANSWER, "reasoning": _SUMMARY if summarised else _THOUGHT}
        self._open: Json = {}
        self._text = ""

    def add(self, piece: Piece) -> Iterator[StreamEvent]:
        """The events of one more piece."""
        yield from self._say("reasoning", piece.reasoning)
        yield from self._say("message", piece.content)
        for call in piece.calls:
            yield from self._call(call)

    def close(self, status: str = "completed") -> Iterator[StreamEvent]:
        """The end of the open item, if there is one."""
        if not self._open:
            return
        texts, text = self._open_texts, self._text
        part, place = texts.of(text), self._place
        logprobs: Json = {"logprobs": []} if texts is _ANSWER else {}
        yield self._event(f"response.{texts.event}.done", **place, text=text, **logprobs)
        yield self._event(f"response.{texts.part_event}.done", **place, part=part)
        yield from self._end({**self._open, texts.field: [part], "status": status})
        self._open, self._text = {}, ""

    def _say(self, kind: str, text: str) -> Iterator[StreamEvent]:
        if not text:
            return
        if self._open.get("type") != kind:
            yield from self.close()
            more: Json = {"role": "assistant"} if kind == "message" else {"summary": []}
            name = _id("msg" if kind == "message" else "rs")
            self._open = {"id": name, "type": kind, "status": "in_progress", "content": [], **more}
            yield self._begin(self._open)
            yield self._event(
                f"response.{self._open_texts.part_event}.added", **self._place, part=self._open_texts.of("")
            )
        self._text += text
        logprobs: Json = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{self._open_texts.event}.delta", **self._place, delta=text, **logprobs)

    def _call(self, call: Call) -> Iterator[StreamEvent]:
        yield from self.close()
        item: Json = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        place = {"item_id": item["id"], "output_index": len(self.closed)}
        yield self._begin({**item, "arguments": "", "status": "in_progress"})
        name = "response.function_call_arguments"
        yield self._event(f"{name}.delta", **place, delta=call.arguments)
        yield self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments)
        yield from self._end({**item, "arguments": call.arguments, "status": "completed"})

    @property
    def _place(self) -> Json:
        return {"item_id": self._open["id"], "output_index": len(self.closed), f"{self._open_texts.field}_index": 0}

    @property
    def _open_texts(self) -> _Texts:
        return self._texts[str(self._open["type"])]

    def _begin(self, item: Json) -> StreamEvent:
        return self._event("response.output_item.added", output_index=len(self.closed), item=item)

    def _end(self, item: Json) -> Iterator[StreamEvent]:
        yield self._event("response.output_item.done", output_index=len(self.closed), item=item)
        self.closed.append(item)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _given(model: object) -> Json:
    return model.model_dump(by_alias=True, exclude_none=True) if isinstance(model, BaseModel) else {}
