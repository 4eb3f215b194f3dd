"""How one model writes thoughts and calls, and what can be done with that."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Protocol, TypeVar

from specexec.errors import BadGrammar
from specexec.text.detokenizer import TextStream
from specexec.text.formats.channels import ChannelScanner
from specexec.text.formats.events import Scanner
from specexec.text.formats.grammars import Wanted, answer_in_channels, answer_of_shape, answer_with_calls
from specexec.text.formats.kinds import Kinds
from specexec.text.formats.marks import Marks, Vocabulary
from specexec.text.formats.probe import Probe
from specexec.text.formats.reader import Reader
from specexec.text.formats.rules import Bound, Whole
from specexec.text.formats.shipped import ShippedForm, ShippedScanner
from specexec.text.formats.table import CallForm, ChannelForm
from specexec.text.formats.tagged import Tagged, Tags
from specexec.text.formats.thinking import Level, Thinking, thinking

_TAIL = 8192  # tokens of an answer that a prompt may hold already

T = TypeVar("T")


class FormatEncoding(Protocol):
    """What is needed of an Encoding: tokens into text."""

    @property
    def tokenizer(self) -> Vocabulary: ...

    def decode(self, tokens: Items[int]) -> str: ...

    def stream(self, before: Items[int]) -> TextStream: ...

    def spell(self, token: int) -> str: ...


@dataclass(frozen=True)
class Format:
    """`thinks` are the marks that open and close a thought. `refusal` says why calls cannot be read, if they cannot.

    `kinds` are the types of the parameters of the tools that are offered.
    """

    encoding: FormatEncoding
    probe: Probe | None
    thinks: tuple[str, str] = ("", "")
    form: CallForm | ChannelForm | ShippedForm | None = None
    refusal: str | None = None
    parallel: bool = True
    kinds: Kinds = field(default_factory=dict)

    @property
    def name(self) -> str:
        if self.form is not None:
            return self.form.name
        return "thoughts" if self.thoughts else "plain"

    @property
    def thoughts(self) -> bool:
        if isinstance(self.form, ShippedForm):
            return self.form.thoughts
        return bool(self.thinks[1]) or isinstance(self.form, ChannelForm)

    @property
    def calls(self) -> bool:
        return self.refusal is None

    @property
    def enforceable(self) -> bool:
        """Whether the form says how calls are written, not only how they are read: a grammar can be made of them."""
        return not isinstance(self.form, ShippedForm)

    def reader(self, prompt: Items[int], written: Items[int] = (), stop: Items[str] = ()) -> Reader:
        """Follows an answer to `prompt`, of which `written` is there already."""
        marks = self._marks()
        reader = Reader(self.encoding.stream, prompt, marks, self._scanner(marks, self._turn(marks, prompt)), stop)
        reader.read(written, last=False)
        return reader

    def thinking(self, level: Level) -> Thinking:
        """The template variables that make the model think as much as asked, and what they do."""
        if self.probe is None:
            return Thinking({}, "the model has no chat template that could set how much to think.")
        return thinking(self.probe, level)

    def grammar(
        self,
        tools: Items[Mapping[str, object]],
        choice: str,
        parallel: bool = True,
        whole: Whole | None = None,
        thought_open: bool = False,
    ) -> Bound:
        """What an answer must look like, after its thought: `choice` is auto, required or a tool's name.

        `whole` is what text must be, and without tools there is nothing but that. Raises BadGrammar where there is no
        tool to call, or calls are not `enforceable`.
        """
        marks = self._marks()
        wanted = Wanted(tools, choice, parallel and self.parallel, whole, thought_open)
        if isinstance(self.form, ChannelForm):
            return answer_in_channels(marks, self.form.channels, wanted)
        if not tools:
            return answer_of_shape(marks, self.thinks, whole or Whole({}), thought_open)
        if isinstance(self.form, ShippedForm):
            raise BadGrammar(
                "calls of this model can be read, not enforced: all that is known of them is its response template.",
                hint="tool_choice auto or none, and no schema beside tools.",
            )
        assert self.form is not None, "a form whose calls are refused has no grammar"
        return answer_with_calls(marks, self.thinks, self.form, wanted)

    @property
    def without_calls(self) -> Format:
        """The same where calls are forbidden: what looks like one is text."""
        if isinstance(self.form, ChannelForm):
            return replace(self, form=replace(self.form, channels=replace(self.form.channels, calls=False)))
        if isinstance(self.form, ShippedForm):
            return replace(self, form=self.form.without_calls)
        return replace(self, form=None)

    @property
    def control_tokens(self) -> frozenset[int]:
        """The tokenizer's special tokens that are no marks of this form."""
        return self._marks().others

    def _turn(self, marks: Marks, prompt: Items[int]) -> str:
        """The end of a prompt in which an answer may have begun: back to the last control token that is no mark."""
        special = self.control_tokens
        parts: list[str] = []
        for token in reversed(prompt[-_TAIL:]):
            if token in special:
                break
            parts.append(marks.char_of_token.get(token) or self.encoding.spell(token))
        return "".join(reversed(parts))

    def _scanner(self, marks: Marks, turn: str) -> Scanner:
        if isinstance(self.form, ChannelForm):
            scanner = ChannelScanner(replace(packed(self.form.channels, marks), kinds=self.kinds))
            start = turn.rfind(marks.pack(self.form.channels.start))
            for _ in scanner.scan(turn[start:] if start >= 0 else "", last=False):
                pass
            return scanner
        if isinstance(self.form, ShippedForm):
            return ShippedScanner(self.form, marks, turn, self.kinds)
        tags = self._tags(marks)
        thinking = bool(tags.think) and turn.rfind(tags.think) > turn.rfind(tags.answer)
        return Tagged(tags, marks.special, thinking)

    def _marks(self) -> Marks:
        return Marks.of(self.encoding.tokenizer, (*self.thinks, *_texts(self.form)))

    def _tags(self, marks: Marks) -> Tags:
        think, answer = map(marks.pack, self.thinks)
        if not isinstance(self.form, CallForm):
            return Tags(think.rstrip(), answer)
        form = packed(self.form, marks)
        return Tags(think.rstrip(), answer, form.shape, form.around, form.silent, self.kinds)


def _texts(form: object) -> list[str]:
    """Every text in a form."""
    if isinstance(form, str):
        return [form]
    if isinstance(form, tuple):
        return [text for part in form for text in _texts(part)]
    return [text for one in fields(form) for text in _texts(getattr(form, one.name))] if is_dataclass(form) else []


def packed(form: T, marks: Marks) -> T:
    """The same form with characters for the marks that are tokens."""
    if isinstance(form, str):
        return marks.pack(form)  # type: ignore[return-value]  # T is str
    if isinstance(form, tuple):
        return tuple(packed(part, marks) for part in form)  # type: ignore[return-value]  # T is a tuple
    if is_dataclass(form) and not isinstance(form, type):
        return replace(form, **{one.name: packed(getattr(form, one.name), marks) for one in fields(form)})
    return form
