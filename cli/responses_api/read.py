"""A body of /v1/responses becomes a chat request. What is left out is said, what cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

from cli.openai.errors import bad_request
from cli.openai.parse import HttpRequest, Message, read_chat, read_translated, validated
from cli.openai.reply import Exchange
from cli.responses_api.items import messages_of
from cli.responses_api.reply import ResponsesReply
from cli.responses_api.schema import Item, NamedTool, PromptRequest, ResponsesRequest
from cli.responses_api.store import ResponseStore

# What each field may say without asking for something that we do not have.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "prompt": (None,),
    "top_logprobs": (None, 0),
    "max_tool_calls": (None,),
    "context_management": (None, []),
}
# Accepted because clients send them as a matter of course; none of them changes a text.
_HARMLESS = {
    *("user", "metadata", "service_tier", "safety_identifier", "stream_options", "include", "moderation"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "client_metadata"),
}
_NAMES = {
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}


class ResponsesReader:
    """Reads requests that may go on from a stored response."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def response(self, body: object, served: Items[str]) -> Exchange:
        """A request for an answer. Raises ApiError."""
        request = validated(ResponsesRequest, body)
        chat = self._chat(request)
        settings: dict[str, object] = {
            "max_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "seed": request.seed,
            "stop": request.stop,
            "stream": request.stream,
        }
        asked = replace(_asked(request, chat, served, settings), cut_by_context=True)
        store = None if request.store is False else self._store
        return Exchange(asked, partial(ResponsesReply, request, chat[bool(request.instructions) :], store))

    def prompt(self, body: object, served: Items[str]) -> HttpRequest:
        """A request to count the tokens of a prompt. Raises ApiError."""
        request = validated(PromptRequest, body)
        return _asked(request, self._chat(request), served, {})

    def _chat(self, request: PromptRequest) -> list[Message]:
        """Instructions, which are never those of an earlier response, the stored conversation, the input."""
        before = request.previous_response_id
        instructions: list[Message] = (
            [{"role": "system", "content": request.instructions}] if request.instructions else []
        )
        earlier = self._store.get(before, "previous_response_id").conversation if before else []
        return [*instructions, *earlier, *messages_of(request.input, self._store.item)]


def _asked(request: PromptRequest, chat: list[Message], served: Items[str], settings: dict[str, object]) -> HttpRequest:
    extra = request.model_extra or {}
    for name, harmless in _UNSUPPORTED.items():
        if extra.get(name) not in harmless:
            raise bad_request(f"{name} is not supported.", name, "unsupported_parameter")
    included = extra.get("include")
    if isinstance(included, list) and "message.output_text.logprobs" in included:
        what = "message.output_text.logprobs is not supported here; /v1/chat/completions has logprobs."
        raise bad_request(what, "include", "unsupported_parameter")
    ignored = sorted(set(extra) - set(_UNSUPPORTED) - _HARMLESS - {"truncation"})
    notes = [f"ignored {name!r}" for name in ignored]
    if extra.get("truncation") == "auto":
        notes.append("truncation 'auto' has no effect: a prompt is never shortened")
    body = {
        "model": request.model,
        "messages": chat,
        "tools": [_tool(tool) for tool in request.tools or []] or None,
        "tool_choice": _choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "response_format": _format(request),
        **settings,
    }
    return read_translated(read_chat, body, served, _NAMES, notes)


def _tool(tool: Item) -> Message:
    """A function as chats offer it; a tool of another type keeps that, and is left out later, which is said."""
    if tool.get("type", "function") != "function":
        return {"type": tool["type"]}
    known = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": known}


def _choice(choice: str | NamedTool | None) -> object:
    if not isinstance(choice, NamedTool):
        return choice
    if choice.type != "function":
        raise bad_request(f"tool_choice of type {choice.type!r} is not supported.", "tool_choice")
    return {"type": "function", "function": {"name": choice.name}}


def _format(request: PromptRequest) -> object:
    given = request.text.format if request.text else None
    if given is None or given.type == "text":
        return None
    return {"type": given.type, **({"json_schema": {"schema": given.schema_}} if given.schema_ else {})}
