"""The token ids of a dialogue, exactly as they were read and written: a new turn adds to them and re-reads nothing.

Tokenising an answer's text again may split it differently, and every key and value after that place would be lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from specexec.stats import FinishReason
from specexec.text.messages import Message, in_front
from specexec.text.template_options import Wishes

_SUMMARY = "(A summary of what we said before: {})\n\n"


class Tokens(Protocol):
    """What a transcript needs of an encoding."""

    def encode(self, prompt: list[Message], wishes: Wishes) -> list[int]: ...

    def raw(self, tokens: Items[int]) -> str: ...


@dataclass
class Turn:
    """One exchange as tokens: the prompt that `asked` became, and the answer `written` to it from one seed."""

    asked: list[Message]
    prompt: list[int]
    written: list[int] = field(default_factory=list)
    ended: FinishReason | None = None
    seed: int | None = None

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.written]


@dataclass(frozen=True)
class LeftOut:
    """The oldest messages of a dialogue, which the model reads no more, and the summary that it reads instead."""

    messages: int = 0
    summary: str = ""


NOTHING = LeftOut()


@dataclass
class Kept:
    """A dialogue at rest: enough to go on with it, in this process or in another."""

    messages: list[Message]
    system: str | None
    turns: list[Turn]
    left_out: LeftOut = NOTHING

    @property
    def dialogue(self) -> list[Message]:
        return dialogue(self.system, self.messages, self.left_out)


def dialogue(system: str | None, messages: Items[Message], left_out: LeftOut = NOTHING) -> list[Message]:
    """All that a chat template is given. A summary stands in front of the first message that is left."""
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    rest = list(messages[left_out.messages :])
    if left_out.summary and rest:
        rest[0] = {**rest[0], "content": in_front(_SUMMARY.format(left_out.summary), rest[0]["content"])}
    return [*first, *rest]


def last_question(messages: Items[Message]) -> int | None:
    """Where the user spoke last; None if never."""
    return next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "user"), None)


def begin(encoding: Tokens, turns: list[Turn], asked: list[Message], wishes: Wishes) -> Turn:
    """A new turn, whose prompt is an earlier one's tokens and more wherever the template writes their very text."""
    fresh = encoding.encode(asked, wishes)
    for turn in reversed(turns):
        if (rest := _after(encoding, turn.tokens, fresh)) is not None:
            return Turn(asked, [*turn.tokens, *rest])
    return Turn(asked, fresh)


def same_text(encoding: Tokens, turn: Turn, wishes: Wishes) -> bool:
    """Whether the prompt of a turn still is what its messages become: the model may be another one now."""
    return _after(encoding, turn.prompt, encoding.encode(turn.asked, wishes)) == []


def belonging(turns: Iterable[Turn], dialogue: list[Message]) -> list[Turn]:
    """The turns whose question and answer are part of a dialogue."""
    places = ((turn, len(turn.asked)) for turn in turns)
    answered = (
        (turn, place) for turn, place in places if place < len(dialogue) and dialogue[place]["role"] == "assistant"
    )
    return [turn for turn, place in answered if turn.asked == dialogue[:place]]


def common(one: Items[int], other: Items[int]) -> int:
    """How many ids two lists begin with alike."""
    differing = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))


def _after(encoding: Tokens, known: list[int], fresh: list[int]) -> list[int] | None:
    """What follows the text of `known` in `fresh`, however that text was split; None where it does not begin so."""
    same = common(known, fresh)
    if same == len(known):
        return fresh[same:]
    start = max(same - 1, 0)  # a decoder may drop a blank at the beginning: that of a token both have
    text = encoding.raw(known[start:])
    end = bisect_left(range(len(fresh) + 1), len(text), lo=same, key=lambda at: len(encoding.raw(fresh[start:at])))
    return fresh[end:] if encoding.raw(fresh[start:end]) == text else None
