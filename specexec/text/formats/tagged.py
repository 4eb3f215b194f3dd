"""Answers with thoughts and calls between marks: `<think>…</think>`, text, `<tool_call>…</tool_call>`."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from specexec.pieces import Call, Malformed, Unfinished
from specexec.text.detokenizer import begun
from specexec.text.formats.events import Between, Event, Said, Turned, calls_in
from specexec.text.formats.kinds import Kinds


class CallShape(Protocol):
    """How one call, or one list of calls, is written."""

    @property
    def begin(self) -> str:
        """The mark before a call; empty where it may begin with anything."""
        ...

    @property
    def end(self) -> str:
        """The mark after it."""
        ...

    @property
    def literals(self) -> Items[str]:
        """Text that a template writes in every call, down to its blank space."""
        ...

    def calls(self, text: str, kinds: Kinds) -> list[Call]:
        """What is between the two marks. Raises Malformed, or Unfinished where it may go on."""
        ...

    def closes(self, text: str) -> bool:
        """Whether a call that can be read is known to be whole before its `end` comes."""
        ...


@dataclass(frozen=True)
class Tags:
    """The marks of a family. `around` are marks before the first call and after the last, `silent` say nothing.

    `think` and `answer` open and close a thought; `answer` may also just begin the answer.
    """

    think: str = ""
    answer: str = ""
    shape: CallShape | None = None
    around: tuple[str, str] = ("", "")
    silent: tuple[str, ...] = ()
    kinds: Kinds = field(default_factory=dict)


class Tagged:
    """Scans one answer. Thoughts come before what is said or after a call; marks in `anywhere` count everywhere."""

    def __init__(self, tags: Tags, anywhere: Items[str], thinking: bool) -> None:
        self._tags = tags
        self._anywhere = set(anywhere)
        self.thinking = thinking
        self._text = ""
        self._begun = False  # whether the answer has begun, so that a mark of a thought is only talked about

    def scan(self, text: str, last: bool) -> Iterator[Event]:
        self._text += text
        going_on = True
        while going_on and self._text:
            before = self._text
            yield from self._thought(last) if self.thinking else self._answer(last)
            going_on = self._text != before

    def _thought(self, last: bool) -> Iterator[Event]:
        thought, closed, rest = self._text.partition(self._tags.answer)
        if closed:
            self._text, self.thinking = rest, False
            yield from (Said(thought, True), Turned())
        else:
            keep = 0 if last else begun(thought, (self._tags.answer,))
            yield Said(self._take(len(thought) - keep), True)

    def _answer(self, last: bool) -> Iterator[Event]:
        found = [(at, -len(mark), mark) for mark in self._openers() if (at := self._text.find(mark)) >= 0]
        if self._bare():
            if last:
                yield from self._read_as_call(len(self._text), self._text)
        elif found:
            at, _, mark = min(found)
            yield from self._say(self._take(at))
            yield from self._marked(mark, last)
        else:
            keep = 0 if last else begun(self._text, self._openers())
            yield from self._say(self._take(len(self._text) - keep))

    def _openers(self) -> list[str]:
        tags, shape = self._tags, self._tags.shape
        thoughts = [mark for mark in (tags.think, tags.answer) if not self._begun or mark[:1] in self._anywhere]
        calls = [] if shape is None else [shape.begin, *tags.around]
        return [mark for mark in (*thoughts, *calls, *tags.silent) if mark]

    def _bare(self) -> bool:
        shape = self._tags.shape
        start = self._text.lstrip()
        return shape is not None and not shape.begin and not self._begun and start[:1] in ("{", "[")

    def _marked(self, mark: str, last: bool) -> Iterator[Event]:
        tags, shape = self._tags, self._tags.shape
        if mark == tags.think or mark == tags.answer:
            self._text = self._text.removeprefix(mark)
            self.thinking = mark == tags.think
            yield Turned()
        elif shape is not None and mark == shape.begin:
            yield from self._marked_call(shape, last)
        elif mark in tags.silent:
            self._text = self._text.removeprefix(mark)
            yield Turned()
        else:
            self._text = self._text.removeprefix(mark)
            yield Between(mark)

    def _marked_call(self, shape: CallShape, last: bool) -> Iterator[Event]:
        start = searched = len(shape.begin)
        ending = shape.end or shape.begin
        while (at := self._text.find(ending, searched)) >= 0:
            try:
                calls_in(self._text[start:at], self._read)
            except Unfinished:  # the mark is inside an argument
                searched = at + len(ending)
            except Malformed:
                break
            else:
                break
        if at >= 0:
            yield from self._read_as_call(at + len(shape.end), self._text[start:at])
        elif last:
            inside = self._text[start : len(self._text) - begun(self._text, (ending,))]
            if not shape.end or shape.closes(inside):
                yield from self._read_as_call(len(self._text), inside)
            else:
                yield from self._say(self._take(len(self._text)))

    def _read_as_call(self, length: int, inside: str) -> Iterator[Event]:
        taken = self._take(length)
        try:
            yield from calls_in(inside, self._read)
            self._begun = False
        except (Unfinished, Malformed):
            yield from self._say(taken)

    def _read(self, inside: str) -> list[Call]:
        assert self._tags.shape is not None
        return self._tags.shape.calls(inside, self._tags.kinds)

    def _say(self, text: str) -> Iterator[Event]:
        if text:
            self._begun = self._begun or bool(text.strip())
            yield Said(text)

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken
