"""The token ids of a dialogue, exactly as they were read and written: a new turn adds to them and re-reads nothing.

Tokenising an answer's text again may split it differently, and every key and value after that place would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from specexec.stats import FinishReason

Message: TypeAlias = dict[str, str]


class Tokens(Protocol):
    """What a transcript needs of an encoding."""

    def encode(self, prompt: list[Message]) -> list[int]: ...

    def decode(self, tokens: Items[int]) -> str: ...

    def render(self, messages: list[Message]) -> str: ...

    def encode_rest(self, text: str) -> list[int]: ...

    def spell(self, token: int) -> str: ...


@dataclass
class Turn:
    """One exchange as tokens: the prompt that `asked` became, and the answer `written` to it from one seed."""

    asked: list[Message]
    prompt: list[int]
    written: list[int] = field(default_factory=list)
    ended: FinishReason | None = None
    seed: int | None = None


def begin(encoding: Tokens, turns: list[Turn], asked: list[Message]) -> Turn:
    """A new turn, whose prompt is an earlier one's tokens and more wherever the template allows it."""
    for turn in reversed(turns):
        if turn.asked == asked:
            return Turn(asked, turn.prompt)
        if (grown := _grown(encoding, turn, asked)) is not None:
            return Turn(asked, grown)
    return Turn(asked, encoding.encode(asked))


def _grown(encoding: Tokens, turn: Turn, asked: list[Message]) -> list[int] | None:
    known = len(turn.asked)
    if not turn.written or asked[:known] != turn.asked or len(asked) <= known or asked[known]["role"] != "assistant":
        return None
    answer = asked[known]["content"]
    if encoding.decode(turn.written) != answer:  # cut at a stop text
        return None
    before, now = encoding.render(turn.asked) + answer, encoding.render(asked)
    if not now.startswith(before):  # such as templates that leave out earlier thoughts
        return None
    rest = now[len(before) :]
    if turn.ended == "stop":  # the model itself wrote the end of its turn
        ending = encoding.spell(turn.written[-1])
        if not rest.startswith(ending):
            return None
        rest = rest[len(ending) :]
    return [*turn.prompt, *turn.written, *encoding.encode_rest(rest)]
