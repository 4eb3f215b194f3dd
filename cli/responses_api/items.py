"""Items of an input as messages of a chat. What an assistant thought, said and called becomes one message."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from cli.openai.errors import ApiError, bad_request
from cli.openai.parse import Message
from cli.responses_api.schema import Item
from specexec.text.pictures import is_picture, picture_part

_ROLES = ("user", "system", "developer", "assistant")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def messages_of(items: str | Items[Item], stored: Callable[[str], Item | None]) -> list[Message]:
    """Messages; `stored` finds an item of an earlier response by its id. Raises ApiError, which names the item."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not items:
        raise bad_request("input: at least one item is needed.", "input")
    chat: list[Message] = []
    for index, item in enumerate(items):
        _add(chat, item, f"input.{index}", stored)
    return chat


def _add(chat: list[Message], item: Item, at: str, stored: Callable[[str], Item | None]) -> None:
    match item.get("type", "message"):
        case "message":
            _message(chat, item, at)
        case "reasoning":
            thought = _text(item.get("content") or item.get("summary") or [], f"{at}.content")
            open_one = _assistant(chat, fresh=bool(chat) and (chat[-1].get("content") or chat[-1].get("tool_calls")))
            open_one["reasoning_content"] = f"{open_one.get('reasoning_content', '')}{thought}"
        case "function_call":
            function = {"name": _string(item, "name", at), "arguments": _string(item, "arguments", at)}
            call = {"id": _string(item, "call_id", at), "type": "function", "function": function}
            message = _assistant(chat)
            calls = message.get("tool_calls")
            message["tool_calls"] = [*(calls if isinstance(calls, list) else []), call]
        case "function_call_output":
            output = _text(item.get("output"), f"{at}.output")
            chat.append({"role": "tool", "tool_call_id": _string(item, "call_id", at), "content": output})
        case "item_reference":
            _add(chat, _found(_string(item, "id", at), at, stored), at, stored)
        case kind:
            raise bad_request(f"{at}: items of type {kind!r} are not known here.", at, "unsupported_content")


def _message(chat: list[Message], item: Item, at: str) -> None:
    role = item.get("role")
    text = (
        _parts(item.get("content"), f"{at}.content") if role == "user" else _text(item.get("content"), f"{at}.content")
    )
    if role not in _ROLES:
        raise bad_request(f"{at}.role: {', '.join(_ROLES)} are known.", f"{at}.role")
    if role == "assistant":
        _assistant(chat, fresh=bool(chat) and chat[-1].get("content"))["content"] = text
    else:
        chat.append({"role": role, "content": text})


def _assistant(chat: list[Message], fresh: object = False) -> Message:
    """The assistant's message that is being put together, or a `fresh` one."""
    if fresh or not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": ""})
    return chat[-1]


def _found(name: str, at: str, stored: Callable[[str], Item | None]) -> Item:
    item = stored(name)
    if item is None:
        raise ApiError(404, "item_not_found", f"{at}: no item {name!r} is stored here.", param=at)
    return item


def _parts(content: object, at: str) -> str | list[Message]:
    """Text, or the parts of a message that holds an image."""
    if not isinstance(content, list) or not any(is_picture(part) for part in content):
        return _text(content, at)
    return [_shown(part, f"{at}.{index}") for index, part in enumerate(content)]


def _shown(part: object, at: str) -> Message:
    if not is_picture(part):
        return {"type": "text", "text": _part(part, at)}
    url = part.get("image_url") if isinstance(part, dict) else None
    if not isinstance(url, str):
        raise bad_request(f"{at}: an image needs an image_url.", at, "unsupported_content")
    return picture_part(url)


def _text(content: object, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{at}: neither text nor parts of text.", at)
    return "".join(_part(part, f"{at}.{index}") for index, part in enumerate(content))


def _part(part: object, at: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind not in (*_TEXTS, "refusal"):
        raise bad_request(f"{at}: only text is read here, not {kind!r}.", at, "unsupported_content")
    return _string(part, "refusal" if kind == "refusal" else "text", at)


def _string(item: Item, name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{at}.{name}: text is needed.", f"{at}.{name}")
    return value
