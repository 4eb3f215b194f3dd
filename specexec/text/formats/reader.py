"""An answer as it arrives, split into content, reasoning and calls. Tokens in, pieces out, in any chunking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from specexec.pieces import Call, Piece
from specexec.text.detokenizer import TextStream, begun
from specexec.text.formats.events import Between, Event, Said, Scanner, Turned
from specexec.text.formats.marks import Marks


class Reader:
    """Follows one answer. `stopped` says that a stop string has come; nothing of the answer is given out after it."""

    def __init__(
        self,
        stream: Callable[[Items[int]], TextStream],
        prompt: Items[int],
        marks: Marks,
        scanner: Scanner,
        stop: Items[str] = (),
    ) -> None:
        self._stream = stream
        self._marks = marks
        self._scanner = scanner
        self._text = stream(prompt)
        self._sides = {False: _Side(marks, stop), True: _Side(marks, stop, after_mark=True)}

    @property
    def thinking(self) -> bool:
        """Whether a thought is open here."""
        return self._scanner.thinking

    @property
    def stopped(self) -> bool:
        return any(side.stopped for side in self._sides.values())

    def read(self, tokens: Items[int], last: bool) -> Piece:
        """The next tokens of the answer; with `last`, everything held back comes out."""
        calls: list[Call] = []
        said = {False: "", True: ""}
        for event in self._events(tokens, last):
            if self.stopped:
                break
            if isinstance(event, Call):
                arguments = self._marks.unpack_json(event.arguments)
                calls.append(Call(self._marks.unpack(event.name), arguments, self._marks.unpack(event.id)))
            for thought, side in self._sides.items():
                said[thought] += side.add(event, thought)
        for thought, side in self._sides.items():
            said[thought] += side.end() if last and not self.stopped else ""
        return Piece(said[False], said[True], tuple(calls))

    def _events(self, tokens: Items[int], last: bool) -> Iterator[Event]:
        text = ""
        for token in tokens:
            if char := self._marks.char_of_token.get(token):
                text += self._text.take(last=True) + char
                self._text = self._stream([token])
            else:
                self._text.add(token)
        yield from self._scanner.scan(text + self._text.take(last), last)


class _Side:
    """Content or reasoning: blank space at its edges is dropped next to a mark, a stop string cuts it."""

    def __init__(self, marks: Marks, stop: Items[str], after_mark: bool = False) -> None:
        self._marks = marks
        self._stop = tuple(stop)
        self._gap = ""  # blank space and marks that count only if more text follows
        self._after_mark = after_mark
        self._held = ""  # may be the beginning of a stop string
        self._begun = False
        self.stopped = False

    def add(self, event: Event, thought: bool) -> str:
        """What an event adds to this side's text."""
        match event:
            case Said(text, of_thought) if of_thought == thought:
                return self._say(self._marks.unpack(text))
            case Between(text) if not thought:
                self._gap += self._marks.unpack(text)
            case Call() | Turned():
                self._gap, self._after_mark = "", True
        return ""

    def _say(self, text: str) -> str:
        body = text.rstrip()
        if not body:
            self._gap += text
            return ""
        if self._after_mark and not self._begun:
            self._gap, body = "", body.lstrip()
        new = self._gap + body
        self._gap, self._after_mark, self._begun = text[len(text.rstrip()) :], False, True
        return self._cut(new)

    def _cut(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held, self._gap = True, "", ""
            return text[: min(found)]
        keep = begun(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, once nothing more comes."""
        gap, self._gap = ("" if self._after_mark else self._gap), ""
        text = self._cut(gap)
        rest, self._held = self._held, ""
        return text + rest
