"""A body of /v1/messages becomes a chat request. What is left out is said, what cannot be read is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial

from cli.messages_api.reply import MessagesReply
from cli.messages_api.schema import Block, Content, CountRequest, MessagesRequest, MessagesToolChoice, ToolDefinition
from cli.openai.errors import bad_request
from cli.openai.parse import HttpRequest, Message, read_chat, read_translated, validated
from cli.openai.reply import Exchange
from specexec.text.pictures import picture_part

# Accepted because clients send them as a matter of course; none of them changes a text.
_HARMLESS = {
    *("metadata", "service_tier", "cache_control", "inference_geo", "speed", "user_profile_id", "workspace_id"),
    *("diagnostics", "container"),
}
_NAMES = {"stop": "stop_sequences", "response_format": "output_config.format", "reasoning_effort": "thinking"}


def messages(body: object, served: Items[str]) -> Exchange:
    """A request for an answer. Raises ApiError."""
    request = validated(MessagesRequest, body)
    asked = _asked(
        request,
        served,
        {
            "max_tokens": request.max_tokens,
            "stream": request.stream,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "seed": request.seed,
        },
    )
    return Exchange(replace(asked, cut_by_context=True), partial(MessagesReply, request.max_tokens))


def counted(body: object, served: Items[str]) -> HttpRequest:
    """A request to count the tokens of a prompt. Raises ApiError."""
    return _asked(validated(CountRequest, body), served, {})


def _asked(request: CountRequest, served: Items[str], settings: dict[str, object]) -> HttpRequest:
    notes = [f"ignored {name!r}" for name in sorted(set(request.model_extra or {}) - _HARMLESS)]
    chat: list[Message] = []
    if request.system:
        chat.append({"role": "system", "content": _text(request.system, "system")})
    for index, turn in enumerate(request.messages):
        chat += _turn(turn.role, turn.content, f"messages.{index}.content", notes)
    continued = chat[-1]["role"] == "assistant"
    if continued and chat[-1].get("tool_calls"):
        raise bad_request("a tool_use needs its tool_result in the next message.", "messages")
    choice = request.tool_choice or MessagesToolChoice(type="auto")
    settings |= {
        "model": request.model,
        "messages": chat,
        "continue_final_message": continued,
        "add_generation_prompt": not continued,
        "tools": [_tool(tool, f"tools.{index}") for index, tool in enumerate(request.tools or [])] or None,
        "tool_choice": _choice(choice) if request.tool_choice else None,
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
        "reasoning_effort": _effort(request, notes),
        "response_format": _format(request),
    }
    return read_translated(read_chat, settings, served, _NAMES, notes)


def _turn(role: str, content: Content, at: str, notes: list[str]) -> Iterator[Message]:
    if isinstance(content, str):
        yield {"role": role, "content": content}
    elif role == "assistant":
        yield _answer(content, at, notes)
    elif role == "system":
        yield {"role": role, "content": _text(content, at)}
    else:
        yield from _question(content, at)


def _question(blocks: list[Block], at: str) -> Iterator[Message]:
    """What the user says; every result of a tool is a message of its own, in its place."""
    said: list[Message] = []
    for index, block in enumerate(blocks):
        place = f"{at}.{index}"
        if block.get("type") == "image":
            said.append(_image(block, place))
            continue
        if block.get("type") != "tool_result":
            said.append({"type": "text", "text": _said(block, place)})
            continue
        if said:
            yield {"role": "user", "content": said}
            said = []
        yield _result(block, place)
    if said or not blocks:
        yield {"role": "user", "content": said}


def _result(block: Block, at: str) -> Message:
    call, content = block.get("tool_use_id"), block.get("content", "")
    if not isinstance(call, str):
        raise bad_request(f"{at}.tool_use_id: the id of a tool_use is needed.", f"{at}.tool_use_id")
    if not isinstance(content, str | list):
        raise bad_request(f"{at}.content: neither text nor blocks of text.", f"{at}.content")
    text = _text(content, f"{at}.content")
    failed = block.get("is_error") is True
    return {"role": "tool", "tool_call_id": call, "content": f"Error: {text}" if failed else text}


def _answer(blocks: list[Block], at: str, notes: list[str]) -> Message:
    """What the model said before: its thought, its text and its calls."""
    text, thought = "", ""
    calls: list[Message] = []
    for index, block in enumerate(blocks):
        place = f"{at}.{index}"
        match block.get("type"):
            case "thinking":
                thought += _string(block, "thinking", place)
            case "redacted_thinking":
                notes.append(f"{place}: redacted_thinking is left out, nothing here can read it")
            case "tool_use":
                calls.append(_call(block, place))
            case _:
                text += _said(block, place)
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Block, at: str) -> Message:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise bad_request(f"{at}.input: an object is needed.", f"{at}.input")
    function = {"name": _string(block, "name", at), "arguments": arguments}
    return {"id": _string(block, "id", at), "type": "function", "function": function}


def _image(block: Block, at: str) -> Message:
    """A block of type image: its source is base64, or a data: URL."""
    source = block.get("source")
    if not isinstance(source, dict):
        raise bad_request(f"{at}.source: an object is needed.", f"{at}.source")
    if source.get("type") == "url":
        return picture_part(_string(source, "url", f"{at}.source"))
    if source.get("type") != "base64":
        what = f"{at}.source: base64 is read, not {source.get('type')!r}."
        raise bad_request(what, f"{at}.source", "unsupported_content")
    return picture_part(f"data:image/png;base64,{_string(source, 'data', f'{at}.source')}")


def _text(content: Content, at: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_said(block, f"{at}.{index}") for index, block in enumerate(content))


def _said(block: object, at: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    if not isinstance(block, dict) or kind != "text":
        raise bad_request(f"{at}: only text is read here, not {kind!r}.", at, "unsupported_content")
    return _string(block, "text", at)


def _string(block: Block, name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{at}.{name}: text is needed.", f"{at}.{name}")
    return value


def _tool(tool: ToolDefinition, at: str) -> Message:
    """A tool as chats offer it; one of another type keeps that, and is left out later, which is said."""
    if tool.type not in (None, "custom"):
        return {"type": tool.type}
    if tool.input_schema is None:
        raise bad_request(f"{at}.input_schema: a JSON schema is needed.", f"{at}.input_schema")
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _choice(choice: MessagesToolChoice) -> object:
    if choice.type == "tool":
        if choice.name is None:
            raise bad_request("tool_choice.name: the name of a tool is needed.", "tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _effort(request: CountRequest, notes: list[str]) -> str | None:
    thinking, effort = request.thinking, request.output_config.effort if request.output_config else None
    if thinking is not None and thinking.budget_tokens is not None:
        notes.append("thinking.budget_tokens has no effect: a thought is as long as the model makes it")
    kind = None if thinking is None else thinking.type  # None, adaptive and between_tools leave it to the model
    return "none" if kind == "disabled" else effort or ("on" if kind == "enabled" else None)


def _format(request: CountRequest) -> object:
    given = (request.output_config.format if request.output_config else None) or request.output_format
    return {"type": "json_schema", "json_schema": {"schema": given.schema_}} if given else None
