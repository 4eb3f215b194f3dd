"""Control tokens spelled out in a prompt, as opposed to those that a chat template wrote. Knows no template.

Spelled ones are *marked* before a template sees them: their first character is replaced by one of Unicode's private
use, so text and marked text agree character by character, and whole control tokens in it are the template's own. The
text is cut after every mark before it goes to the tokenizer, which then finds no control token there. A text without
marks is cut nowhere: its tokens are what they always were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

from transformers import PreTrainedTokenizerBase

from specexec.model.image_rows import Image

_PRIVATE = 0xF0000  # a plane of characters without an assigned meaning
_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)  # DeepSeek's bars are of full width


@dataclass(frozen=True)
class Rendered:
    """What messages became: text in which spelled control tokens are marked, by characters that `marks` undoes.

    `images` are those of the messages, each at a place that the template wrote for it.
    """

    marked: str
    marks: Mapping[str, str] = field(default_factory=dict)  # characters, by what replaces them
    images: tuple[Image, ...] = ()

    @property
    def text(self) -> str:
        """As the model reads it."""
        return self.marked.translate({ord(mark): char for mark, char in self.marks.items()})

    def after(self, length: int) -> Rendered:
        """Without the first `length` characters."""
        return Rendered(self.marked[length:], self.marks)


class ControlTokens:
    """The control tokens of a tokenizer: those that are special, those that its template writes, and `<|…|>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {one.content for one in added if one.special} | set(tokenizer.all_special_tokens)
        self.all = special | {one.content for one in added if _is_control(one.content, template)}
        self._special, self._any = _any_of(special), _any_of(self.all)

    def spelled_in(self, value: object) -> bool:
        """Whether any of them is spelled in a text, or somewhere in JSON."""
        return any(self._any.search(text) for text in _texts(value))

    def marks_for(self, value: object) -> dict[str, str]:
        """Characters that occur nowhere in a text or JSON, for the first characters of control tokens."""
        used = {char for text in _texts(value) if not text.isascii() for char in text if ord(char) >= _PRIVATE}
        free = (char for char in map(chr, count(_PRIVATE)) if char not in used)
        return {next(free): first for first in sorted({text[0] for text in self.all})}

    def mark(self, value: object, marks: Mapping[str, str], special_only: bool = False) -> object:
        """A text or JSON with all spelled control tokens marked, or with those that are special tokens."""
        of_first = {first: mark for mark, first in marks.items()}
        pattern = self._special if special_only else self._any

        def marked(text: str) -> str:
            while pattern.search(text):  # again, for one may hold another
                text = pattern.sub(lambda found: of_first[found[0][0]] + found[0][1:], text)
            return text

        return _replaced(value, marked)

    def encode(self, prompt: Rendered) -> list[int]:
        """Token ids, none of which is a control token that is marked; no special tokens are added."""
        cuts = f"(?<=[{re.escape(''.join(prompt.marks))}])" if prompt.marks else "(?!)"
        first, *others = (Rendered(piece, prompt.marks).text for piece in re.split(cuts, prompt.marked))
        return [*self._cut([first])[0], *(token for piece in self._within(others) for token in piece)]

    def _within(self, pieces: list[str]) -> Iterator[list[int]]:
        """Tokens of pieces that other text goes before: some tokenizers put a blank where a text begins."""
        if not pieces:
            return
        (lead,) = self._cut(["\n"])
        led = self._cut([f"\n{piece}" for piece in pieces])
        for piece, tokens in zip(pieces, led, strict=True):
            yield tokens[len(lead) :] if tokens[: len(lead)] == lead else self._cut([piece])[0]

    def _cut(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _is_control(text: str, template: str) -> bool:
    return bool(_SHAPE.fullmatch(text)) or (text in template and not text.isspace() and not text.isalnum())


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(name)): _replaced(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, change) for item in value]
    return value
