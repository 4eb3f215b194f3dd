"""What a reasoning model thinks before it answers, told apart from the answer. Pieces of text in, runs of text out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Run:
    """Some text of one kind."""

    text: str
    thought: bool


class Thoughts:
    """Follows one answer. Thoughts come first or not at all: a tag in the middle of an answer is part of it.

    `cue` is the end of the prompt (some templates open the thoughts themselves), `so_far` what an answer that is gone
    on with already says.
    """

    def __init__(self, cue: str = "", so_far: str = "") -> None:
        self.thinking = cue.rstrip().endswith(OPEN)
        self._begun = self.thinking
        self._held = ""
        for _ in self.feed(so_far):
            pass

    def feed(self, text: str) -> Iterator[Run]:
        """The next piece; text that may be the beginning of a tag is held back until it is known."""
        text, self._held = self._held + text, ""
        if not self._begun:
            start = text.lstrip()
            if OPEN.startswith(start):  # also when there is nothing but space yet
                self._held = text
                return
            self._begun = True
            if start.startswith(OPEN):
                self.thinking, text = True, start.removeprefix(OPEN).lstrip("\n")
        if self.thinking:
            thought, closed, text = text.partition(CLOSE)
            if not closed:
                thought, self._held = _before_tag(thought)
            if thought:
                yield Run(thought, True)
            if not closed:
                return
            self.thinking = False
            self._begun, self._held = True, ""
        if text:
            yield Run(text, False)

    def end(self) -> Iterator[Run]:
        """What was held back for a tag that never came."""
        if self._held:
            yield Run(self._held, self.thinking)
            self._held = ""


def answer_in(text: str, cue: str = "") -> str:
    """A whole message without its thoughts."""
    return "".join(run.text for run in _runs(text, cue) if not run.thought).lstrip("\n")


def thoughts_in(text: str, cue: str = "") -> str:
    """The thoughts alone."""
    return "".join(run.text for run in _runs(text, cue) if run.thought).strip("\n")


def _runs(text: str, cue: str) -> list[Run]:
    thoughts = Thoughts(cue)
    return [*thoughts.feed(text), *thoughts.end()]


def _before_tag(text: str) -> tuple[str, str]:
    """Text, and the end of it that may be the beginning of a closing tag."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return text[:-size], text[-size:]
    return text, ""
