"""Conversations that a chat template is made to write, so that it shows how its model writes thoughts and calls."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

from specexec.errors import SpecexecError
from specexec.text.formats.pieces import Json
from specexec.wishes import EndsIn, Wishes

QUESTION, ANSWER, THOUGHT = "Qprobe1", "Aprobe2", "Tprobe3"
ARGUMENTS: tuple[tuple[str, dict[str, Json]], ...] = (
    (
        "probe_all",
        {
            "text": 'one "two"\nthree\\ é 日本 <b>&amp;</b> it\'s',
            "digits": "42",
            "count": 3,
            "share": 0.5,
            "flag": True,
            "list": ["a", "b c", 1],
            "object": {"inner": {"deep": "x, y"}, "n": -1},
        },
    ),
    ("probe_none", {}),
    ("probe_one", {"text": " edges "}),
)
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class Renders(Protocol):
    """What is needed of an Encoding here."""

    def render(self, messages: Items[dict[str, object]], wishes: Wishes | None = None) -> str: ...


@dataclass(frozen=True)
class Shown:
    """What a template made of an assistant's turn: the prompt before it and the answer itself."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Probe:
    """Renders conversations with one template; what it refuses comes out as None."""

    encoding: Renders
    wishes: Wishes

    def cue(self, variables: Mapping[str, object] | None = None) -> str | None:
        """The prompt for a first answer when the template is told these variables besides."""
        told = replace(self.wishes, variables={**self.wishes.variables, **(variables or {})})
        return replace(self, wishes=told)._render([_user()], "answer")

    def answer(self, calls: int = 0, content: str = "", reasoning: str = "") -> Shown | None:
        """An assistant's turn with the first of ARGUMENTS as calls."""
        message: dict[str, object] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {"id": _id(at), "type": "function", "function": {"name": name, "arguments": arguments}}
                for at, (name, arguments) in enumerate(ARGUMENTS[:calls])
            ]
        prompt, whole = self._render([_user()], "answer"), self._render([_user(), message], "nothing")
        if prompt is None or whole is None or QUESTION not in whole:
            return None
        start = _common(prompt, whole)
        return Shown(whole[:start], _without(whole[start:], self._ending()))

    def _ending(self) -> str:
        """What the template writes after an answer."""
        whole = self._render([_user(), {"role": "assistant", "content": ANSWER}], "nothing")
        return "" if whole is None else whole.rpartition(ANSWER)[2]

    def _render(self, messages: list[dict[str, object]], ends_in: EndsIn) -> str | None:
        wishes = Wishes(tools=tools(), variables=self.wishes.variables, ends_in=ends_in)
        try:
            return self.encoding.render(messages, wishes)
        except SpecexecError:
            return None


def tools() -> tuple[dict[str, object], ...]:
    """Definitions of the tools that the probe calls."""
    made: list[dict[str, object]] = []
    for name, arguments in ARGUMENTS:
        properties = {key: {"type": _KINDS[type(value)], "description": key} for key, value in arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": list(arguments)}
        made.append({"type": "function", "function": {"name": name, "description": name, "parameters": parameters}})
    return tuple(made)


def _user() -> dict[str, object]:
    return {"role": "user", "content": QUESTION}


def _id(at: int) -> str:
    return f"probeid{at:02}"  # nine letters and digits: Mistral's templates take nothing else


def _common(prompt: str, whole: str) -> int:
    """Where the answer begins: as far as both agree, but not inside a mark."""
    size = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))
    size = min(size, len(whole))
    for left, right in ("<>", "[]"):
        opened = whole.rfind(left, 0, size)
        closed = whole.find(right, opened)
        if opened > whole.rfind(right, 0, size) and closed >= size:
            size = opened
    return size


def _without(answer: str, ending: str) -> str:
    """The answer without what the template writes after it, as much of that as is there."""
    size = next(n for n in range(len(ending), -1, -1) if n == 0 or answer.endswith(ending[-n:]))
    return answer[: len(answer) - size]
