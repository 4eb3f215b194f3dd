"""One line of a JSONL file becomes one Item, whatever the line holds. Knows no file.

Two kinds of line: our own (a prompt, messages or text, sampling beside it), and those of OpenAI's batch API, known by
custom_id and body.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from cli.batch.items import Item, Json, Prompt, is_text, wishes_of
from cli.errors import BadJsonl
from specexec.errors import BadText, EmptyPrompt, SpecexecError

_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
FIELDS = ("prompt", "messages", "text")
# Parts of an OpenAI request that would change the answer in a way we do not offer; silence would be a lie.
UNSUPPORTED = ("tools", "functions", "response_format", "logit_bias", "best_of", "suffix", "top_logprobs")


@dataclass(frozen=True)
class Form:
    """How a text becomes a prompt: the field that holds it, a template around it, a system message before it."""

    field: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool = True

    def prompt(self, value: Json, place: str, fields: Mapping[str, Json] | None = None) -> Prompt:
        """The prompt made of one value; raises what is wrong with it."""
        messages = _messages(value)
        if messages is not None and self.template is None:
            if not self.chat:
                raise BadJsonl(f"{place}: messages need the chat template.", hint="leave out --raw.")
            return self._with_system(messages)
        if self.template is not None:
            value = self._filled({**(fields or {}), "text": value}, place)
        if not isinstance(value, str):
            raise BadJsonl(f"{place}: neither text nor messages with role and content.")
        if not is_text(value):
            raise BadText(f"{place}: half a character (a lone surrogate) is not text.")
        if not value.strip():
            raise EmptyPrompt(f"{place}: the prompt is empty.")
        return self._with_system([{"role": "user", "content": value}]) if self.chat else value

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if not self.system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _filled(self, fields: Mapping[str, Json], place: str) -> str:
        try:
            return _TEMPLATES.from_string(self.template or "").render(fields)
        except TemplateError as problem:
            raise BadJsonl(f"{place}: the template cannot be filled: {_said(problem)}.") from problem


def template_problem(text: str) -> str | None:
    """What is wrong with a template, whatever it will be filled with."""
    try:
        _TEMPLATES.parse(text)
    except TemplateSyntaxError as problem:
        return f"line {problem.lineno} of the template: {_said(problem)}."
    return None


def _said(problem: TemplateError) -> str:
    return (problem.message or type(problem).__name__).removesuffix(".")


def item_of_line(line: bytes, place: str, form: Form) -> Item:
    """The item of one line. Never raises: what is wrong with the line becomes the item's problem."""
    name = place
    try:
        record = _record(line, place)
        name = _name(record, place)
        body = record.get("body")
        if "custom_id" in record and isinstance(body, dict):
            return _from_openai(name, body, place, form)
        wanted = (form.field,) if form.field else FIELDS
        key = next((key for key in wanted if key in record), None)
        if key is None and form.template is None:
            missing = " or ".join(map(repr, wanted))
            raise BadJsonl(f"{place}: no field {missing}.", hint="name it with --field.")
        value = None if key is None else record[key]
        prompt = form.prompt(value, place if key is None else f"{place}: field {key!r}", record)
        return Item(name, prompt, wishes_of(record, place))
    except SpecexecError as problem:
        return Item(name, problem=problem)


def _record(line: bytes, place: str) -> dict[str, Json]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise BadJsonl(f"{place}: not UTF-8 text.") from None
    except json.JSONDecodeError as problem:
        raise BadJsonl(f"{place}: not JSON ({problem.msg}, column {problem.colno}).") from None
    except (RecursionError, ValueError) as problem:  # nested without end, or a number of thousands of digits
        raise BadJsonl(f"{place}: not JSON that can be read ({type(problem).__name__}).") from None
    if not isinstance(record, dict):
        kind = "null" if record is None else f"a {type(record).__name__}"
        raise BadJsonl(f"{place}: a line must be an object, this is {kind}.")
    return record


def _name(record: dict[str, Json], place: str) -> str:
    """What the line calls itself; its place where it has no name."""
    given = record.get("custom_id", record.get("id"))
    if given is None:
        return place
    if isinstance(given, bool) or not isinstance(given, (int, float, str)) or not is_text(str(given)):
        raise BadJsonl(f"{place}: an id is text or a number.")
    if isinstance(given, float) and not math.isfinite(given):
        raise BadJsonl(f"{place}: an id is text or a finite number.")
    return str(given)


def _from_openai(name: str, body: dict[str, Json], place: str, form: Form) -> Item:
    refused = [key for key in UNSUPPORTED if body.get(key)] + [key for key in ("n",) if body.get(key) not in (None, 1)]
    refused += [key for key in ("stream", "logprobs", "echo") if body.get(key)]
    if refused:
        raise BadJsonl(f"{place}: {refused[0]!r} is not supported in batch work.")
    if "max_completion_tokens" in body:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    if "messages" in body:
        return Item(name, form.prompt(body["messages"], f"{place}: field 'messages'", body), wishes_of(body, place))
    if "prompt" not in body:
        raise BadJsonl(f"{place}: the body has neither 'messages' nor 'prompt'.")
    # /v1/completions continues the text as it is.
    raw = Form(template=form.template, chat=False)
    return Item(name, raw.prompt(body["prompt"], f"{place}: field 'prompt'", body), wishes_of(body, place))


def _messages(value: Json) -> list[dict[str, str]] | None:
    """`value`, if it is what a chat template takes."""
    if not isinstance(value, list) or not value:
        return None
    messages: list[dict[str, str]] = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role"), _content(message.get("content"))
        if not (isinstance(role, str) and content is not None and is_text(role) and is_text(content)):
            return None
        others = {key: text for key, text in message.items() if isinstance(text, str) and is_text(text)}
        messages.append({**others, "content": content})
    return messages


def _content(value: Json) -> str | None:
    """What a message says, whole or in OpenAI's parts of text; None if it is anything else, such as a picture."""
    if isinstance(value, str) or not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    said = [text for text in texts if isinstance(text, str)]
    return "".join(said) if len(said) == len(value) else None
