"""Lines of training data, ShareGPT's and Alpaca's, read as questions.

Answers that follow the last question are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cli.batch.input.items import Json
from cli.shared.errors import BadJsonl

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Question:
    """What a line asks, as text or as messages, and whether it also held an answer to that."""

    asked: Json
    answered: bool


def question_of(record: Mapping[str, Json], place: str) -> Question | None:
    """The question of a line of training data; None if it is none. Raises BadJsonl."""
    if isinstance(turns := record.get("conversations"), list):
        return _sharegpt(turns, f"{place}: field 'conversations'")
    if "instruction" in record and ("output" in record or not {"prompt", "messages", "text"} & set(record)):
        return _alpaca(record, place)
    return None


def _sharegpt(turns: list[Json], place: str) -> Question:
    messages: list[Json] = [_message(turn, f"{place}.{at}") for at, turn in enumerate(turns)]
    asked = len(messages)
    while asked and _role(messages[asked - 1]) == "assistant":
        asked -= 1
    if not asked or _role(messages[asked - 1]) == "system":
        raise BadJsonl(f"{place}: there is no question in it.")
    return Question(messages[:asked], asked < len(messages))


def _message(turn: Json, place: str) -> Json:
    said = turn if isinstance(turn, dict) else {}
    role, content = said.get("from", said.get("role")), said.get("value", said.get("content"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadJsonl(f"{place}: from is one of {', '.join(_ROLES)}.", hint="'messages' in OpenAI's shape.")
    return {"role": _ROLES[role], "content": content}


def _role(message: Json) -> Json:
    return message["role"] if isinstance(message, dict) else None


def _alpaca(record: Mapping[str, Json], place: str) -> Question:
    instruction, more = record["instruction"], record.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(more, str):
        raise BadJsonl(f"{place}: 'instruction' and 'input' are text.")
    return Question(f"{instruction}\n\n{more}" if more.strip() else instruction, bool(record.get("output")))
