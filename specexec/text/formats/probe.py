"""Conversations that a chat template is made to write, so that it shows how its model writes thoughts and calls."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from specexec.errors import SpecexecError
from specexec.pieces import Json
from specexec.text.template_options import EndsIn, Wishes

QUESTION, ANSWER, THOUGHT = "Qprobe1", "Aprobe2", "Tprobe3"
Asked: TypeAlias = tuple[tuple[str, dict[str, Json]], ...]  # names of tools and arguments to call them with

ARGUMENTS: Asked = (
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
    """What a template made of an assistant's turn: the prompt before it, and the answer with all that follows."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Probe:
    """Renders conversations with one template; what it refuses comes out as None."""

    encoding: Renders
    wishes: Wishes
    asked: Asked = ARGUMENTS
    rendered: dict[str, str | None] = field(default_factory=dict, repr=False)  # by what was asked for

    def cue(self, variables: Mapping[str, object] | None = None) -> str | None:
        """The prompt for a first answer when the template is given these variables too."""
        wishes = replace(self.wishes, variables={**self.wishes.variables, **(variables or {})})
        return replace(self, wishes=wishes)._render([_user()], "answer")

    def answer(self, calls: int = 0, content: str = "", reasoning: str = "") -> Shown | None:
        """An assistant's turn with the first of what is asked as calls."""
        message: dict[str, object] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {"id": _id(at), "type": "function", "function": {"name": name, "arguments": arguments}}
                for at, (name, arguments) in enumerate(self.asked[:calls])
            ]
        prompt, whole = self._render([_user()], "answer"), self._render([_user(), message], "nothing")
        if prompt is None or whole is None or QUESTION not in prompt or QUESTION not in whole:
            return None
        before, _, answer = whole.rpartition(QUESTION)
        start = _common(prompt.rpartition(QUESTION)[2], answer)
        return Shown(before + QUESTION + answer[:start], answer[start:])

    def ending(self) -> str:
        """What the template writes after an answer."""
        whole = self._render([_user(), {"role": "assistant", "content": ANSWER}], "nothing")
        return "" if whole is None else whole.rpartition(ANSWER)[2]

    def _render(self, messages: list[dict[str, object]], ends_in: EndsIn) -> str | None:
        wishes = Wishes(tools=tools(self.asked), variables=self.wishes.variables, ends_in=ends_in)
        key = repr((messages, wishes.variables, ends_in))
        if key not in self.rendered:
            try:
                self.rendered[key] = self.encoding.render(messages, wishes)
            except SpecexecError:
                self.rendered[key] = None
        return self.rendered[key]


def tools(asked: Asked = ARGUMENTS) -> tuple[dict[str, object], ...]:
    """Definitions of the tools that are called so."""
    made: list[dict[str, object]] = []
    for name, arguments in asked:
        properties = {key: {"type": _KINDS[type(value)], "description": key} for key, value in arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": list(arguments)}
        made.append({"type": "function", "function": {"name": name, "description": name, "parameters": parameters}})
    return tuple(made)


def _user() -> dict[str, object]:
    return {"role": "user", "content": QUESTION}


def _id(at: int) -> str:
    return f"probeid{at:02}"  # nine letters and digits: Mistral's templates take nothing else


def _common(cue: str, whole: str) -> int:
    """Where the answer begins: as far as both agree but for blank space, and not inside a mark."""
    at = size = 0
    while at < len(cue) and size < len(whole):
        if cue[at] == whole[size]:
            at, size = at + 1, size + 1
        elif cue[at].isspace():
            at += 1
        elif whole[size].isspace():
            size += 1
        else:
            break
    for left, right in ("<>", "[]"):
        opened = whole.rfind(left, 0, size)
        closed = whole.find(right, opened)
        if opened > whole.rfind(right, 0, size) and closed >= size:
            size = opened
    return size
