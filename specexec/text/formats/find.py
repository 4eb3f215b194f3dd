"""Which form a model's chat template writes: the first that reads back what the template was made to write."""

from __future__ import annotations

import json
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from specexec.text.formats.format import Format, Words
from specexec.text.formats.pieces import Call
from specexec.text.formats.probe import ANSWER, ARGUMENTS, QUESTION, THOUGHT, Probe, Renders, Shown
from specexec.text.formats.table import CALLS, THOUGHTS
from specexec.wishes import Wishes


class Templates(Words, Renders, Hashable, Protocol):
    """What is needed of an Encoding."""

    def encode_rest(self, text: str) -> list[int]: ...

    def template_for(self, wishes: Wishes) -> str: ...


def format_of(encoding: Templates, wishes: Wishes = Wishes()) -> Format:  # noqa: B008  (frozen)
    """How the model behind this chat template writes thoughts and calls."""
    return _found(encoding, _source(encoding, wishes), _Variables(wishes))


class _Variables:
    """Wishes that are equal where their variables are: what else they hold does not change a form."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = Wishes(variables=wishes.variables)
        self._key = json.dumps(dict(wishes.variables), sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Variables) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=16)
def _found(encoding: Templates, source: str | None, variables: _Variables) -> Format:
    if source is None:
        return Format(encoding, None, refusal="the model has no chat template, so it cannot be told of tools")
    probe = Probe(encoding, variables.wishes)
    plain = Format(encoding, probe, _thinks(encoding, source, probe))
    one = probe.answer(calls=1)
    if one is None:
        return replace(plain, refusal="the model's chat template refuses a conversation with a tool call")
    if ARGUMENTS[0][0] not in one.answer:
        return replace(plain, refusal="the model's chat template leaves tool calls out")
    for form in CALLS:
        found = replace(plain, form=form)
        if form.shape.begin in one.answer and _reads(found, encoding, one, 1):
            return replace(found, parallel=_parallel(found, encoding, probe))
    return replace(plain, refusal=f"the model's chat template writes calls in an unknown way ({_short(one.answer)})")


def _source(encoding: Templates, wishes: Wishes) -> str | None:
    try:
        return encoding.template_for(wishes)
    except ValueError:
        return None


def _thinks(encoding: Templates, source: str, probe: Probe) -> tuple[str, str]:
    """The marks of thoughts that the template writes, or names, or that are tokens."""
    shown = probe.answer(content=ANSWER, reasoning=THOUGHT)
    cue = (probe.cue() or "").rpartition(QUESTION)[2]
    written = cue + (shown.answer if shown else "")
    added = encoding.tokenizer.get_added_vocab()
    for place in (written, source):
        for think, answer in THOUGHTS:
            if think in place and (answer in place or answer in source):
                return think, answer
            if answer in place:
                return think, answer
    return next(((think, answer) for think, answer in THOUGHTS if think in added and answer in added), ("", ""))


def _parallel(form: Format, encoding: Templates, probe: Probe) -> bool:
    several = probe.answer(calls=len(ARGUMENTS))
    return several is not None and _reads(form, encoding, several, len(ARGUMENTS))


def _reads(form: Format, encoding: Templates, shown: Shown, calls: int) -> bool:
    """Whether this form reads back the probe's calls, and nothing besides."""
    reader = form.reader(encoding.encode_rest(shown.prompt))
    piece = reader.read(encoding.encode_rest(shown.answer), last=True)
    return _values(piece.calls) == [*ARGUMENTS[:calls]] and not piece.content.strip()


def _values(calls: Items[Call]) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def _short(text: str) -> str:
    return repr(text.strip()[:40])
