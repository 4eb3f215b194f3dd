"""How one model writes thoughts and calls, and what can be done with that."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

from specexec.text.formats.grammars import answer_in_json, answer_with_calls
from specexec.text.formats.marks import Marks, Vocabulary
from specexec.text.formats.pieces import Call
from specexec.text.formats.probe import Probe
from specexec.text.formats.reader import Reader
from specexec.text.formats.rules import Bound
from specexec.text.formats.table import CallForm
from specexec.text.formats.tagged import Shape, Tagged, Tags
from specexec.text.formats.thinking import Level, Thinking, thinking

_TAIL = 32  # tokens at the end of a prompt in which a template may open a thought

T = TypeVar("T", bound=object)


class Words(Protocol):
    """What is needed of an Encoding: tokens into text."""

    @property
    def tokenizer(self) -> Vocabulary: ...

    def decode(self, tokens: Items[int]) -> str: ...

    def spell(self, token: int) -> str: ...


@dataclass(frozen=True)
class Format:
    """`thinks` are the marks that open and close a thought. `refusal` says why calls cannot be read, if they cannot."""

    encoding: Words
    probe: Probe | None
    thinks: tuple[str, str] = ("", "")
    form: CallForm | None = None
    refusal: str | None = None
    parallel: bool = True

    @property
    def name(self) -> str:
        if self.form is not None:
            return self.form.name
        return "thoughts" if self.thoughts else "plain"

    @property
    def thoughts(self) -> bool:
        return bool(self.thinks[1])

    @property
    def calls(self) -> bool:
        return self.refusal is None

    def reader(self, prompt: Items[int], written: Items[int] = (), stop: Items[str] = ()) -> Reader:
        """Follows an answer to `prompt`, of which `written` is there already."""
        marks = self._marks()
        tags = self._tags(marks)
        tail = "".join(marks.char_of_token.get(token) or self.encoding.spell(token) for token in prompt[-_TAIL:])
        thinking = bool(tags.think) and tail.rfind(tags.think) > tail.rfind(tags.answer)
        reader = Reader(self.encoding.decode, marks, Tagged(tags, marks.special, thinking), stop)
        reader.read(written, last=False)
        return reader

    def thinking(self, level: Level) -> Thinking:
        """What to tell the chat template so that the model thinks as much as asked, and what that does."""
        if self.probe is None:
            return Thinking({}, "the model has no chat template that could be told how much to think.")
        return thinking(self.probe, level)

    def message(self, content: str, reasoning: str, calls: Items[Call]) -> dict[str, object]:
        """An answer as a message of the history, in OpenAI's shape."""
        message: dict[str, object] = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return message

    def grammar(
        self,
        tools: Items[Mapping[str, object]],
        choice: str,
        parallel: bool = True,
        schema: Mapping[str, object] | None = None,
        thought_open: bool = False,
    ) -> Bound:
        """What an answer must look like, after its thought: `choice` is auto, required or a tool's name.

        With a schema and no tools, a JSON answer. Raises BadGrammar where there is no tool to call.
        """
        marks = self._marks()
        if not tools:
            return answer_in_json(marks, self.thinks, schema or {}, thought_open)
        assert self.form is not None, "a form whose calls are refused has no grammar"
        return answer_with_calls(marks, self.thinks, self.form, tools, choice, parallel and self.parallel, thought_open)

    def _marks(self) -> Marks:
        form = self.form
        shape = () if form is None else tuple(_texts(form.shape))
        around = () if form is None else (*form.around, *form.silent)
        return Marks.of(self.encoding.tokenizer, (*self.thinks, *around, *shape))

    def _tags(self, marks: Marks) -> Tags:
        think, answer = map(marks.pack, self.thinks)
        if self.form is None:
            return Tags(think.rstrip(), answer)
        first, after = map(marks.pack, self.form.around)
        silent = tuple(map(marks.pack, self.form.silent))
        return Tags(think.rstrip(), answer, packed(self.form.shape, marks), (first, after), silent)


def _texts(shape: Shape) -> list[str]:
    return [value for field in fields(shape) if isinstance(value := getattr(shape, field.name), str)]  # type: ignore[arg-type]


def packed(shape: Shape, marks: Marks) -> Shape:
    """The same shape with characters for the marks that are tokens."""
    texts = {field.name: getattr(shape, field.name) for field in fields(shape)}  # type: ignore[arg-type]
    return replace(shape, **{name: marks.pack(text) for name, text in texts.items() if isinstance(text, str)})  # type: ignore[type-var]
