"""The form that a model ships itself, as a response template, read by transformers' own parser (5.23).

It says how an answer is read, not what may be written: calls come out, and none can be enforced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from specexec.pieces import Call, Malformed, call_of
from specexec.text.formats.events import Event, Said, Turned, calls_in
from specexec.text.formats.kinds import Kinds
from specexec.text.formats.marks import Marks
from specexec.text.templates import TemplateFailed, parsed

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"
_ENDS = ("open", "open_pattern", "close", "close_pattern")
_LONGEST = 65_536  # characters of a template
_SECONDS = 2.0  # of a processor, for all patterns of one answer
_QUICK_S = 0.001  # of which those that take no longer use up nothing, so that long answers are read to their end


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
    def as_read(self) -> str:
        """The template for a part of an answer, in which no field must be."""
        settings = json.loads(self.template)
        for field in settings["fields"].values():
            field.pop("optional", None)
        return json.dumps(settings)

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
        text = json.dumps(template)
        if len(text) > _LONGEST or not _can_be_followed(text):
            return None
    except (
        Exception
    ):  # whatever somebody else's template makes the parser raise, or this transformers has no such parser
        return None
    texts = "\0".join(_texts(template))
    return ShippedForm(text, tuple(token for token in tokens if token.strip() and token in texts))


class ShippedScanner:
    """Scans one answer to a prompt that ends in `turn`. What cannot be read as a call is text, from its mark on.

    A template is a program of somebody else's. The patterns that begin and end its fields have `_SECONDS` in all for
    one answer, after which the rest is text; what is inside a call is read in another process (templates.py).
    """

    def __init__(self, form: ShippedForm, marks: Marks, turn: str, kinds: Kinds) -> None:
        self._form, self._marks, self._tools = form, marks, _tools(kinds)
        self._parser: ResponseParser | None = None
        self._field: str | None = None  # that is open
        self._unsaid = ""  # what no event has held yet: the beginning of a mark, or a call with its mark
        with suppress(Exception):  # then all is text
            self._parser = _parser(form.template, marks.unpack(turn))
            for event in self._parser.initial_events:
                self._field = None if event["type"] == "region_close" else event["field"]

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
            except Exception:
                events = self._given_up()
            yield from self._events_of(events)

    def _fed(self, char: str) -> Iterator[Event]:
        if self._parser is None:
            yield Said(char)
            return
        self._unsaid += char
        try:
            events = self._parser.feed(char)
        except Exception:
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
                text = self._unsaid
                if field == _CALLS or event is events[-1]:  # else the mark that opens the next region ends this one
                    self._unsaid = ""
                yield Turned()
                if field == _CALLS:
                    yield from self._called(text)
            elif field != _CALLS:
                self._unsaid = self._unsaid[len(event["text"]) :]
                yield Said(event["text"], field in _THOUGHTS)

    def _called(self, text: str) -> Iterator[Event]:
        try:
            yield from calls_in(text, self._calls)
        except Malformed:
            yield Said(text)

    def _calls(self, text: str) -> list[Call]:
        """The calls of one region, with its marks. Raises Malformed."""
        try:
            value = parsed(self._form.as_read, text, self._tools).get(_CALLS)
            return [_call(one) for one in (value if isinstance(value, list) else [value])]
        except (TemplateFailed, ValueError, TypeError):
            raise Malformed from None


def _call(value: object) -> Call:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed
    arguments = function.get("arguments", {})
    return Call(function["name"], arguments) if isinstance(arguments, str) else call_of(function["name"], arguments)


class _Limited:
    """A compiled pattern that takes its time from `left`, that of all patterns of one answer. Raises TimeoutError."""

    def __init__(self, pattern: Any, left: list[float]) -> None:
        self._pattern, self._left = pattern, left

    def search(self, text: str, at: int, partial: bool = False) -> Any:
        return self._timed(lambda left: self._pattern.search(text, at, partial=partial, timeout=left))

    def finditer(self, text: str) -> Any:
        return self._timed(lambda left: [*self._pattern.finditer(text, timeout=left)])

    def _timed(self, match: Callable[[float], Any]) -> Any:
        if self._left[0] <= 0:
            raise TimeoutError
        started = time.thread_time()
        found = match(self._left[0])
        self._left[0] -= max(time.thread_time() - started - _QUICK_S, 0)
        return found


def _parser(template: str, prefix: str) -> ResponseParser:
    from transformers.utils.chat_parsing import ResponseParser

    left = [_SECONDS]
    spec = _followed(template)
    fields = {
        name: replace(
            field,
            open_re=field.open_re and _Limited(field.open_re, left),
            close_re=field.close_re and _Limited(field.close_re, left),
        )
        for name, field in spec.fields.items()
    }
    return ResponseParser(replace(spec, fields=fields, start_anchor_re=_Limited(spec.start_anchor_re, left)), prefix)


@lru_cache(maxsize=16)
def _followed(template: str) -> ResponseTemplate:
    """A template with all that says where a field begins and ends, and nothing of what is inside."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    settings = json.loads(template)
    fields = {
        name: {"transform": "{content}", **{key: value for key, value in field.items() if key in _ENDS}}
        for name, field in settings["fields"].items()
    }
    return load_response_template({**settings, "defaults": {}, "fields": fields})


def _can_be_followed(template: str) -> bool:
    """Whether its parser takes it, and none of its marks is nothing at all. Raises what the parser raises."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    load_response_template(json.loads(template))
    patterns = [one for field in _followed(template).fields.values() for one in (field.open_re, field.close_re) if one]
    return all(pattern.search("", timeout=_SECONDS) is None for pattern in patterns)


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
