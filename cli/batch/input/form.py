"""How a text becomes a prompt: a template around it, a system message before it, the chat template or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from cli.batch.input.items import Json, Message, Prompt, is_text
from cli.shared.errors import BadJsonl
from offload.machine.folders import typed_path
from specexec.errors import BadMessages, BadText, EmptyPrompt
from specexec.text.pictures import data_url, is_picture, picture_part
from specexec.text.templates import TemplateFailed, fill

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


@dataclass(frozen=True)
class Form:
    """The field that holds the text, a template around it, a system message before it."""

    field: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = True

    def prompt(self, value: Json, place: str, fields: Mapping[str, Json] | None = None) -> Prompt:
        """The prompt made of one value; raises what is wrong with it. Messages and token ids are not looked into."""
        if self.template is not None:
            value = self._filled({**(fields or {}), "text": value}, place)
        elif messages := _objects(value):
            if not self.chat:
                raise BadJsonl(f"{place}: messages need the chat template.", hint="leave out --raw.")
            return self.with_system([_with_files(message, place) for message in messages])
        elif ids := _ids(value):
            return ids
        if not isinstance(value, str):
            raise BadJsonl(f"{place}: neither text nor messages with role and content.")
        if not is_text(value):
            raise BadText(f"{place}: half a character (a lone surrogate) is not text.")
        if not value.strip():
            raise EmptyPrompt(f"{place}: the prompt is empty.")
        return self.with_system([{"role": "user", "content": value}]) if self.chat else value

    def with_system(self, messages: list[Message]) -> list[Message]:
        """With the run's system message before messages that have none."""
        if not self.system or messages[0].get("role") in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _filled(self, fields: Mapping[str, Json], place: str) -> str:
        try:
            return fill(self.template or "", fields)
        except TemplateFailed as problem:
            what = f"cannot be filled: {_said(problem.reason)}." if problem.reason else problem
            raise BadJsonl(f"{place}: the template {what}") from problem


def template_problem(text: str) -> str | None:
    """What is wrong with a template, whatever it will be filled with."""
    try:
        SandboxedEnvironment().parse(text)
    except TemplateSyntaxError as problem:
        return f"line {problem.lineno} of the template: {_said(str(problem))}."
    except RecursionError:
        return "the template is nested too deeply."
    return None


def _said(reason: str) -> str:
    return reason.partition("\n")[0].removesuffix(".")


def _objects(value: Json) -> list[Message]:
    """`value`, if it is a list of objects, as messages are."""
    messages: list[Message] = [{**item} for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return messages if isinstance(value, list) and len(messages) == len(value) else []


def _with_files(message: Message, place: str) -> Message:
    """The message with the image files that it names inside it; a path is as the command line would read it."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": [_with_file(part, place) for part in parts]}


def _with_file(part: Json, place: str) -> object:
    given = part.get("image_url") if isinstance(part, dict) and is_picture(part) else None
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or _SCHEME.match(url):
        return part
    try:
        return picture_part(data_url(typed_path(url)))
    except BadMessages as problem:
        raise BadJsonl(f"{place}: {problem.what}", hint=problem.hint) from problem


def _ids(value: Json) -> list[int]:
    ids = [item for item in value if type(item) is int] if isinstance(value, list) else []
    return ids if isinstance(value, list) and len(ids) == len(value) else []
