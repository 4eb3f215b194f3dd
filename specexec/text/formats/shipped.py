"""The form that a model ships itself, as a response template, read by transformers' own parser (5.23).

It says how an answer is read, not what may be written: calls come out, and none can be enforced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from specexec.pieces import Call
from specexec.text.formats.events import Event, Said, Turned
from specexec.text.formats.kinds import Kinds
from specexec.text.formats.marks import Marks

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"


@dataclass(frozen=True)
class ShippedForm:
    """`template` is transformers' response template, as JSON; `marks` are the tokens that it names."""

    name: ClassVar[str] = "response template"

    template: str
    marks: tuple[str, ...] = ()

    @property
    def thoughts(self) -> bool:
        """Whether it tells thoughts from the answer."""
        return not _fields(self.template).keys().isdisjoint(_THOUGHTS)

    @property
    def calls(self) -> bool:
        """Whether it tells calls from the answer."""
        return _CALLS in _fields(self.template)

    @property
    def without_calls(self) -> ShippedForm:
        """The same where what looks like a call is text."""
        settings = json.loads(self.template)
        settings["fields"].pop(_CALLS, None)
        return replace(self, template=json.dumps(settings))


def shipped_form(template: object, tokens: Mapping[str, int]) -> ShippedForm | None:
    """The form of a tokenizer's `response_template`; None where there is none, or none that its parser takes."""
    if not isinstance(template, dict):
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        load_response_template(template)
    except (ImportError, ValueError, TypeError, KeyError):  # or this transformers has no such parser
        return None
    texts = "\0".join(_texts(template))
    return ShippedForm(json.dumps(template), tuple(token for token in tokens if token.strip() and token in texts))


class ShippedScanner:
    """Scans one answer to a prompt that ends in `turn`. What cannot be read as a call is text, from its mark on."""

    def __init__(self, form: ShippedForm, marks: Marks, turn: str, kinds: Kinds) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._marks = marks
        self._parser: ResponseParser | None = ResponseParser(
            json.loads(form.template), prefix=marks.unpack(turn), tools=_tools(kinds)
        )
        self._field: str | None = None  # that is open
        self._unsaid = ""  # what no event has told of yet: the beginning of a mark, or a call with its mark
        for _ in self._events_of(self._parser.initial_events):
            pass

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._field in _THOUGHTS

    def scan(self, text: str, last: bool) -> Iterator[Event]:
        """The next piece of text, one character at a time: the parser forgets what led to its errors."""
        for char in self._marks.unpack(text):
            yield from self._fed(char)
        if last and self._parser is not None:
            try:
                events = self._parser.finalize()[1]
            except ValueError:
                events = self._given_up()
            yield from self._events_of(events)

    def _fed(self, char: str) -> Iterator[Event]:
        if self._parser is None:
            yield Said(char)
            return
        self._unsaid += char
        try:
            events = self._parser.feed(char)
        except ValueError:
            events = self._given_up()
        yield from self._events_of(events)

    def _given_up(self) -> list[dict[str, Any]]:
        """What was not said yet, as text; and so is all that comes."""
        self._parser, unsaid = None, self._unsaid
        return [
            {"type": "region_open", "field": "content"},
            {"type": "region_chunk", "field": "content", "text": unsaid},
        ]

    def _events_of(self, events: list[dict[str, Any]]) -> Iterator[Event]:
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_open":
                self._field = field
                self._unsaid = self._unsaid if field == _CALLS else ""
                yield Turned()
            elif kind == "region_close":
                self._field = None
                if field == _CALLS or event is events[-1]:  # else the mark that opens the next region ends this one
                    self._unsaid = ""
                yield Turned()
                yield from _calls(event["value"]) if field == _CALLS else ()
            elif field != _CALLS:
                self._unsaid = self._unsaid[len(event["text"]) :]
                yield Said(event["text"], field in _THOUGHTS)


def _calls(value: object) -> Iterator[Call]:
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function", one) if isinstance(one, dict) else {}
        arguments = function.get("arguments", {})
        if isinstance(name := function.get("name"), str):
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            yield Call(name, text)


def _tools(kinds: Kinds) -> list[Any]:
    """Definitions that say of each parameter what is known, which its parser wants for bare text."""
    properties = {name: {key: {"type": sorted(types)} for key, types in of.items()} for name, of in kinds.items()}
    return [{"function": {"name": name, "parameters": {"properties": of}}} for name, of in properties.items()]


def _fields(template: str) -> Mapping[str, object]:
    fields: Mapping[str, object] = json.loads(template)["fields"]
    return fields


def _texts(value: object) -> Iterator[str]:
    """Every text in a template, as it is and without the escapes of a pattern."""
    if isinstance(value, str):
        yield value
        yield value.replace("\\", "")
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
