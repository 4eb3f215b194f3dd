"""Prompts that the context cannot hold, cut or left out. Needs the tokenizer, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cli.batch.items import Item, Prompt
from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams

if TYPE_CHECKING:
    from specexec.encoding import Encoding

TooLong = Literal["error", "left", "skip"]


@dataclass(frozen=True)
class Fitted:
    """What goes into the run, and what was done for it."""

    items: list[Item]
    cut: int
    skipped: int


def fitted(items: Iterable[Item], encoding: Encoding, context: int, run: SamplingParams, how: TooLong) -> Fitted:
    """The items with prompts shorter than the context.

    `left` cuts what is too long so far that the whole answer has room; what cannot be cut stays an error of its own.
    """
    kept: list[Item] = []
    cut = skipped = 0
    for item in items:
        if item.problem is not None or _length(item.prompt, encoding) < context:
            kept.append(item)
        elif how == "skip":
            skipped += 1
        else:
            room = max(context - item.sampling(run).max_tokens, 1)
            shorter = _cut(item.prompt, room, encoding)
            cut += shorter != item.prompt
            kept.append(replace(item, prompt=shorter))
    return Fitted(kept, cut, skipped)


def _length(prompt: Prompt, encoding: Encoding) -> int:
    try:
        return len(encoding.encode(prompt))
    except SpecexecError:  # the template refuses it: the engine will say so in that item's record
        return 0


def _cut(prompt: Prompt, room: int, encoding: Encoding) -> Prompt:
    """At most `room` tokens: the oldest text goes first, instructions stay; the same prompt if that is not enough."""
    if isinstance(prompt, str):
        shorter: Prompt = _shortened(prompt, _length(prompt, encoding) - room, encoding)
        return shorter if shorter and _length(shorter, encoding) <= room else prompt
    messages = [dict(message) for message in prompt]
    for message in messages:
        while message["role"] != "system" and message["content"] and (over := _length(messages, encoding) - room) > 0:
            message["content"] = _shortened(message["content"], over, encoding)
    return messages if messages[-1]["content"] and _length(messages, encoding) <= room else prompt


def _shortened(text: str, tokens: int, encoding: Encoding) -> str:
    """Without the first so many tokens of its own."""
    return encoding.decode(encoding.encode_rest(text)[tokens:])
