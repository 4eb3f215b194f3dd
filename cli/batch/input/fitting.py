"""Prompts that the context cannot hold, cut or left out. Needs the tokenizer, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cli.batch.input.items import Item, Prompt
from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams
from specexec.text.template_options import Wishes

if TYPE_CHECKING:
    from specexec.text.tokenizer import Encoding

TooLong = Literal["error", "left", "skip"]


@dataclass(frozen=True)
class Fitted:
    """What goes into the run, and what was done for it."""

    items: list[Item]
    cut: int
    skipped: int


def fitted(
    items: Iterable[Item],
    encoding: Encoding,
    context: int,
    run: SamplingParams,
    how: TooLong,
) -> Fitted:
    """The items with prompts shorter than the context.

    `left` cuts what is too long so far that the whole answer has room; what cannot be cut stays an error of its own.
    """
    kept: list[Item] = []
    cut = skipped = 0
    for item in items:
        shelf = _Shelf(encoding, item.template)
        if item.problem is not None or all(shelf.length(prompt) < context for prompt in item.prompts):
            kept.append(item)
        elif how == "skip":
            skipped += 1
        else:
            room = max(context - item.sampling(run).max_tokens, 1)
            fits = tuple(
                prompt if shelf.length(prompt) < context else shelf.cut(prompt, room) for prompt in item.prompts
            )
            cut += fits != item.prompts
            kept.append(item.with_prompts(fits))
    return Fitted(kept, cut, skipped)


@dataclass(frozen=True)
class _Shelf:
    """Measures and cuts the prompts of one item."""

    encoding: Encoding
    wishes: Wishes | None

    def length(self, prompt: Prompt) -> int:
        try:
            return len(self.encoding.encode(prompt, self.wishes))
        except SpecexecError:  # the template refuses it: the engine will say so in that item's record
            return 0

    def cut(self, prompt: Prompt, room: int) -> Prompt:
        """At most `room` tokens: the oldest text goes first, instructions stay; the same if that is not enough."""
        if isinstance(prompt, str):
            shorter = prompt
            while shorter and (over := self.length(shorter) - room) > 0:
                shorter = self._shortened(shorter, over)
            return shorter or prompt
        messages = [dict(item) for item in prompt if isinstance(item, dict)]
        if not messages:
            return prompt[-room:]
        for message in messages:
            while message["role"] != "system" and (over := self.length(messages) - room) > 0:
                if not (text := message["content"]) or not isinstance(text, str):
                    break
                message["content"] = self._shortened(text, over)
        return messages if messages[-1]["content"] and self.length(messages) <= room else prompt

    def _shortened(self, text: str, tokens: int) -> str:
        """Without the first so many tokens of its own, and the half of a character that may be left of them."""
        ids = self.encoding.encode_part(text, self.wishes)
        # A blank that the tokenizer itself puts in front is a token without text.
        rests = (self.encoding.raw(ids[count:]).lstrip("\ufffd") for count in range(tokens, len(ids)))
        return next((rest for rest in rests if len(rest) < len(text)), "")
