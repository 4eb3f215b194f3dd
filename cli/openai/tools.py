"""Tools that a request offers, as the client wrote them: key order kept, nothing added. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cli.openai.errors import bad_request
from cli.openai.schema import ChatRequest, ToolChoice

Definition = dict[str, object]
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """What may be called. `choice` is auto, required, or the name of the one that must be."""

    offered: tuple[Definition, ...]
    choice: str
    parallel: bool


@dataclass(frozen=True)
class ToolOffer:
    """The tools of a request, if there are any to call, and one sentence for each that is left out."""

    tools: Tools | None
    notes: tuple[str, ...] = ()


def read_tools(request: ChatRequest) -> ToolOffer:
    """What the model may call. Tools of other kinds than functions are left out. Raises ApiError."""
    offered: dict[str, Definition] = {}
    notes: list[str] = []
    for index, tool in enumerate(request.tools or []):
        if tool.get("type", "function") != "function":
            notes.append(f"tools.{index} of type {tool['type']!r} is left out: only functions can be called here.")
            continue
        name = _name(tool, f"tools.{index}.function")
        if name in offered:
            raise bad_request(f"two tools have the same name, {name!r}.", "tools")
        offered[name] = tool
    choice = request.tool_choice or "auto"
    named = choice.function.name if isinstance(choice, ToolChoice) else choice
    if named not in ("none", "auto", "required", *offered) or (named == "required" and not offered):
        left_out = f" ({' '.join(notes)})" if notes else ""
        known = ", ".join(offered) or "nothing"
        raise bad_request(f"tool_choice asks for {named!r}; tools offers: {known}{left_out}.", "tool_choice")
    if not offered or named == "none":
        return ToolOffer(None, tuple(notes))
    return ToolOffer(Tools(tuple(offered.values()), named, request.parallel_tool_calls is not False), tuple(notes))


def _name(tool: Definition, at: str) -> str:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise bad_request(f"{at}: a function with a name is needed.", at)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(f"{at}.name: up to 64 letters, digits, '_', '.' and '-' are allowed.", f"{at}.name")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise bad_request(f"{at}.parameters: a JSON schema (an object) is needed.", f"{at}.parameters")
    return name
