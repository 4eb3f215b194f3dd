"""Messages as clients send them, and as one chat template reads them. Knows no tokens.

Clients send OpenAI's shape: content in parts or null, the arguments of a call as a string of JSON, `developer` for
instructions. Most templates were written for other shapes. What one template reads is found by showing it a small
conversation (`traits_of`), and messages are given to it that way (`as_read`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeAlias

from specexec.errors import BadMessages, BadText, UnreadContent
from specexec.text.pictures import is_picture, picture_in, picture_part

Message: TypeAlias = dict[str, object]
Content: TypeAlias = str | list[Message]
Prompt: TypeAlias = str | Items[int] | Items[Mapping[str, object]]  # raw text, token ids, or messages for the template

TEXTS = ("text", "input_text")
_CITY = {"city": "Oslo"}
_PRINTED = "{'city': 'Oslo'"  # an object in Python's own notation: no model was trained on that
_ROLE = "Speak like a pirate."
_PLAIN_ID, _STRICT_ID = "call_00000001", "c00000001"
_STRICT_LENGTH = 9  # letters and digits, as Mistral's templates demand
PROBE_TOOLS: tuple[Message, ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    },
)


@dataclass(frozen=True)
class Traits:
    """What a template makes of messages.

    `developer`: it shows that role. `text_arguments`: it reads the arguments of a call as JSON text, not as an object.
    `loose_arguments`: it takes text there that is no JSON. `strict_ids`: it refuses ids of calls that are not of nine
    letters and digits.
    """

    developer: bool = True
    text_arguments: bool = False
    loose_arguments: bool = True
    strict_ids: bool = False


def completed(tool: Message) -> Message:
    """A tool with what OpenAI's shape lets out, empty and last: some templates fail where it is missing."""
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    empty: Message = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": {**function, **{key: empty[key] for key in empty if key not in function}}}


def read_messages(messages: Items[object], blind: str | None = "") -> list[Message]:
    """Messages in OpenAI's shape, checked: content is text, every call has a name, what is null is left out.

    `blind` says why images are refused; with None, content that holds one is a list of parts. The arguments of a call
    stay as they came: an object or text. Other fields are kept as they are, in their order.
    Raises BadMessages that begins with the place (`messages.3.content: …`), BadText.
    """
    return [_message(message, f"messages.{index}", blind) for index, message in enumerate(messages)]


def content_of(text: str, pictures: Items[str]) -> Content:
    """What a user says, with images (data: URLs) before it."""
    if not pictures:
        return text
    return [*map(picture_part, pictures), {"type": "text", "text": text}]


def question(content: Content) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def in_front(text: str, content: object) -> Content:
    """A message's content with a text before it, and its images where they are."""
    if isinstance(content, list):
        return [{"type": "text", "text": text}, *content]
    return text + text_in(content)


def text_in(content: object) -> str:
    """What is said in a message's content, without its images."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def pictures_of(content: object) -> list[str]:
    """The images of `content_of`."""
    parts = content if isinstance(content, list) else []
    return [str(part["image_url"]["url"]) for part in parts if is_picture(part)]


def all_text(messages: Items[object]) -> bool:
    """Whether no message holds anything but text."""
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for found in contents if isinstance(found, list | tuple) for part in found)
    return all(isinstance(part, Mapping) and part.get("type", "text") in TEXTS for part in parts)


def pictures_in(messages: Items[Message]) -> tuple[list[Message], list[tuple[str, bytes]]]:
    """Messages as a template is given them, and the image files in them in order, each with its place."""
    found: list[tuple[str, bytes]] = []
    shown = []
    for index, message in enumerate(messages):
        if isinstance(parts := message["content"], list):
            at = f"messages.{index}.content"
            found += [(f"{at}.{n}", picture_in(part, f"{at}.{n}")) for n, part in enumerate(parts) if is_picture(part)]
            message = {**message, "content": [{"type": "image"} if is_picture(part) else part for part in parts]}
        shown.append(message)
    return shown, found


def traits_of(render: Callable[[list[Message], bool], str | None]) -> Traits:
    """What a template reads; `render` shows it messages, with PROBE_TOOLS or without, and gives None if it refuses."""
    developer = _ROLE in (render([{"role": "developer", "content": _ROLE}, _said("user", "Hello.")], False) or "")
    ways = [(strict, as_text) for strict in (False, True) for as_text in (False, True)]
    for strict, as_text in ways:
        shown = render(_called(json.dumps(_CITY) if as_text else _CITY, strict), True)
        if shown is not None and _PRINTED not in shown:
            loose = render(_called("Oslo", strict), True) is not None
            return Traits(developer, as_text, loose, strict)
    return Traits(developer)


def needs_traits(messages: Items[Message]) -> bool:
    """Whether `as_read` would ask for any trait."""
    return any(message.get("role") == "developer" or "tool_calls" in message for message in messages)


def as_read(messages: Items[Message], traits: Traits) -> list[Message]:
    """Messages of `read_messages` in the shapes that the template reads; no message or call is left out."""
    return [_as_read(message, traits) for message in messages]


def _message(message: object, at: str, blind: str | None) -> Message:
    if not isinstance(message, Mapping):
        raise BadMessages(f"{at}: not an object with a role and content.")
    _check_text(message, at)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadMessages(f"{at}.role: a message needs a role, such as user.")
    if message.get("function_call"):
        raise BadMessages(f"{at}.function_call: it is older than tools and not supported; send tool_calls.")
    read: Message = {str(name): value for name, value in message.items() if value is not None}
    if "content" not in message and role != "assistant":
        raise BadMessages(f"{at}.content: it is missing.")
    read["content"] = _content(message.get("content"), f"{at}.content", blind)
    calls = read.pop("tool_calls", None)
    if calls:
        read["tool_calls"] = _calls(calls, f"{at}.tool_calls")
    return read


def _content(content: object, at: str, blind: str | None) -> str | list[Message]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise BadMessages(f"{at}: neither text nor parts of text.")
    read: list[Message] = []
    for part in content:
        if blind is None and is_picture(part):
            read.append(dict(part))
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in TEXTS:
            reads = "text" if blind is not None else "text and images"
            raise UnreadContent(f"{at}: this model reads {reads}, not {kind!r}.", blind if is_picture(part) else None)
        if not isinstance(part.get("text"), str):
            raise BadMessages(f"{at}: a part of type text needs a text.")
        read.append({"type": "text", "text": part["text"]})
    if any(is_picture(part) for part in read):
        return read
    return "".join(str(part["text"]) for part in read)


def _calls(calls: object, at: str) -> list[Message]:
    if not isinstance(calls, list | tuple):
        raise BadMessages(f"{at}: not a list of calls.")
    read: list[Message] = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadMessages(f"{at}: a call needs a function with a name.")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str | Mapping):
            raise BadMessages(f"{at}: the arguments of a call are an object, or JSON text of one.")
        spoken = {**function, "arguments": {} if arguments is None or arguments == "" else arguments}
        kept = {str(name): value for name, value in call.items() if value is not None}
        read.append({**kept, "type": call.get("type") or "function", "function": spoken})
    return read


def _as_read(message: Message, traits: Traits) -> Message:
    read = dict(message)
    if read["role"] == "developer" and not traits.developer:
        read["role"] = "system"
    if traits.strict_ids and isinstance(read.get("tool_call_id"), str):
        read["tool_call_id"] = _strict_id(str(read["tool_call_id"]))
    calls = read.get("tool_calls")
    if isinstance(calls, list):
        read["tool_calls"] = [_call_as_read(call, traits) for call in calls]
    return read


def _call_as_read(call: Message, traits: Traits) -> Message:
    function = call["function"]
    assert isinstance(function, dict)
    read = {**call, "function": {**function, "arguments": _arguments(function["arguments"], traits)}}
    if traits.strict_ids and isinstance(read.get("id"), str):
        read["id"] = _strict_id(str(read["id"]))
    return read


def _arguments(arguments: object, traits: Traits) -> object:
    if traits.text_arguments:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    found = json_object(arguments)
    if found is not None:
        return found
    return arguments if traits.loose_arguments else {"arguments": arguments}


def json_object(text: str) -> dict[str, object] | None:
    """The object that a text is in JSON; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _strict_id(name: str) -> str:
    if len(name) == _STRICT_LENGTH and name.isascii() and name.isalnum():
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:_STRICT_LENGTH]


def _check_text(value: object, at: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadText(f"the prompt is not text: {at} holds half a character.") from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_text(name, at)
            _check_text(item, f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_text(item, at)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _called(arguments: object, strict: bool) -> list[Message]:
    name = _STRICT_ID if strict else _PLAIN_ID
    call = {"id": name, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        _said("user", "Hello."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": name, "content": "Rain."},
        _said("user", "Thanks."),
    ]
