"""Parts of an answer as plain values: tool calls, and the pieces in which content arrives."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True)
class Call:
    """One call of a tool; `arguments` is JSON, `id` the family's own where it writes one."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Piece:
    """A part of an answer; all parts add up to its whole content, reasoning and calls, whatever the chunking."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def __add__(self, more: Piece) -> Piece:
        return Piece(self.content + more.content, self.reasoning + more.reasoning, self.calls + more.calls)


def message_of(piece: Piece) -> dict[str, object]:
    """An answer as a message of the history, in OpenAI's shape."""
    message: dict[str, object] = {"role": "assistant", "content": piece.content or (None if piece.calls else "")}
    if piece.reasoning:
        message["reasoning_content"] = piece.reasoning
    if piece.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in piece.calls
        ]
    return message


def call_of(name: str, arguments: Json, own_id: str | None = None) -> Call:
    """A call with its arguments as JSON text; they hold only numbers that JSON has."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return Call(name, text) if own_id is None else Call(name, text, own_id)


class Unfinished(Exception):
    """A call that is right as far as it goes: what seemed to end it may be part of an argument."""


class Malformed(Exception):
    """Text between a call's marks that is no call."""
