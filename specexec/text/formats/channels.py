"""Answers made of messages with headers, as gpt-oss writes them: the channel or the recipient says what a body is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial

from specexec.pieces import Call, Malformed, Unfinished, call_of
from specexec.text.detokenizer import begun
from specexec.text.formats.events import Event, Said, Turned, calls_in
from specexec.text.formats.json_calls import json_at_start
from specexec.text.formats.kinds import Kinds
from specexec.text.formats.rules import Rules, Tool
from specexec.text.formats.xml_calls import XmlCalls

_RECIPIENT = re.compile(r"to=([\w.:-]+)")


@dataclass(frozen=True)
class Channels:
    """The marks of a family: `start` header `message` body and one of `ends`.

    A header that holds `thought` makes the body one; a recipient with this `prefix` makes it a call, JSON or in a
    `shape` of its own, unless it is one of `no_tool` or `calls` are forbidden. `answer`: the channel of the answer.
    """

    start: str
    message: str
    ends: tuple[str, ...]
    thought: str
    prefix: str = ""
    no_tool: tuple[str, ...] = ()
    answer: str = "final"
    channel: str = ""
    constrain: str = ""
    shape: XmlCalls | None = None
    kinds: Kinds = field(default_factory=dict)
    calls: bool = True


class ChannelScanner:
    """Scans one answer, which begins in the header that the prompt began."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._text = ""
        self._header: str | None = ""  # of the body that is being read; None while a header is
        self._written = {False: False, True: False}  # whether content, or a thought, was given before
        self._fresh = False

    @property
    def thinking(self) -> bool:
        thought = re.escape(self._channels.thought) + r"\b"
        return self._header is not None and re.search(thought, self._header) is not None

    def scan(self, text: str, last: bool) -> Iterator[Event]:
        self._text += text
        going_on = True
        while going_on and self._text:
            before = self._header, self._text
            yield from self._read_header(last) if self._header is None else self._read_body(self._header, last)
            going_on = (self._header, self._text) != before

    def _read_header(self, last: bool) -> Iterator[Event]:
        header, found, rest = self._text.partition(self._channels.message)
        if found and self._may_be_header(header):
            self._header, self._text, self._fresh = header, rest, True
            if self.thinking:
                yield Turned()
            elif not self._channels.calls and self._recipient(header):
                yield from self._say(header + self._channels.message, False)
        elif last and not found and self._may_be_header(self._text):
            self._text = ""  # a header that was cut short says nothing
        elif found or last or not self._may_be_header(self._text):
            self._header, self._fresh = "", False
            yield from self._take_as_text(self._channels.start)

    def _take_as_text(self, mark: str) -> Iterator[Event]:
        """A mark at the front that begins no header after all."""
        if mark and self._text.startswith(mark):
            self._text = self._text.removeprefix(mark)
            yield from self._say(mark, False)

    def _may_be_header(self, text: str) -> bool:
        channels = self._channels
        marks = [mark for mark in (channels.start, channels.channel, channels.constrain) if mark]
        for mark in marks:
            text = text.replace(mark, " ", 1)
        text = text[: len(text) - begun(text, (channels.message, *marks))]
        return re.fullmatch(r"[\w.:= -]*", text) is not None

    def _read_body(self, header: str, last: bool) -> Iterator[Event]:
        marks = (*self._channels.ends, self._channels.start)
        found = [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]
        recipient = self._called(header)
        if recipient is not None:
            if found or last:
                at, mark = min(found, default=(len(self._text), ""))
                yield from self._call(header, recipient, self._text[:at])
                self._end(at, mark)
            return
        at, mark = min(found, default=(len(self._text), ""))
        keep = 0 if found or last else begun(self._text, marks)
        yield from self._say(self._text[: at - keep], self.thinking)
        self._text = self._text[at - keep :]
        if found and self.thinking:
            yield Turned()
        if found:
            self._end(0, mark)

    def _end(self, at: int, mark: str) -> None:
        self._text = self._text[at + (len(mark) if mark in self._channels.ends else 0) :]
        self._header = None

    def _called(self, header: str) -> str | None:
        return self._recipient(header) if self._channels.calls else None

    def _recipient(self, header: str) -> str | None:
        """The tool that a body is for."""
        found = _RECIPIENT.search(header)
        name = found[1] if found else ""
        if not name or name in self._channels.no_tool or not name.startswith(self._channels.prefix):
            return None
        return name.removeprefix(self._channels.prefix)

    def _call(self, header: str, name: str, body: str) -> Iterator[Event]:
        try:
            yield from calls_in(body, partial(self._calls, name))
        except (Malformed, Unfinished):
            yield from self._say(header + self._channels.message + body, False)

    def _calls(self, name: str, body: str) -> list[Call]:
        shape = self._channels.shape
        if shape is not None:
            inside = body.strip().removeprefix(shape.begin).removesuffix(shape.end)
            inside = inside[: len(inside) - begun(inside, (shape.end,))]
            return shape.calls(inside, self._channels.kinds)
        arguments, rest = json_at_start(body.strip() or "{}")
        if rest.strip() or not isinstance(arguments, dict):
            raise Malformed
        return [call_of(name, arguments)]

    def _say(self, text: str, thought: bool) -> Iterator[Event]:
        """Text of a body; what is said in two bodies is set apart."""
        if text.strip() and self._fresh:
            if self._written[thought]:
                yield Said("\n\n", thought)
            self._fresh = False
        self._written[thought] = self._written[thought] or bool(text.strip())
        if text:
            yield Said(text, thought)


def channel_rules(
    rules: Rules,
    channels: Channels,
    tools: Items[Tool],
    choice: str,
    parallel: bool,
    shaped: str | None,
    opened: bool,
) -> str:
    """An answer as messages: thoughts, then calls, or where calls only may come: text, free or as a rule has it."""
    again = rules.literal(f"{channels.ends[0]}{channels.start}assistant")
    head = rules.literal(channels.channel or " to=")
    body = f"{rules.literal(channels.message)} {rules.anything()}"
    kind = channels.thought.removeprefix(channels.channel or "to=")
    thought = rules.add("thought", f"{head} {rules.literal(kind)} {body} {again}")
    first = f"{rules.anything()} {again}" if opened else ""
    final = f"{head} {rules.literal(channels.answer)} {rules.literal(channels.message)}"
    said = []
    if tools:
        call = rules.add("call", " | ".join(_call_rule(rules, channels, at, tool) for at, tool in enumerate(tools)))
        said.append(f"{call} ({again} {call})*" if parallel else call)
    if choice == "auto":
        said.append(f"{final} {shaped or rules.anything()}")
    thoughts = f"{thought}*" if shaped is None else "" if opened else f"{thought}?"
    return f"{first} {thoughts} {rules.add('said', ' | '.join(said))}"


def _call_rule(rules: Rules, channels: Channels, at: int, tool: Tool) -> str:
    to, message = f" to={channels.prefix}{tool.name}", rules.literal(channels.message)
    if channels.shape is not None:
        inside = channels.shape.rules(rules, [tool], False)
        return rules.add(f"to_{at}", f"{rules.literal(to)} {message} {rules.literal(channels.shape.begin)} {inside}")
    arguments = rules.add(f"arguments_{at}", rules.json(tool.schema, tool.lenient))
    comment = rules.literal(f"{channels.channel}commentary")
    where = f"({rules.literal(to)} {comment} | {comment} {rules.literal(to)})"
    kind = f'(" "? {rules.literal(channels.constrain)} "json" | " json")?'
    return rules.add(f"to_{at}", f"{where} {kind} {message} {arguments}")
