"""Which format a model's chat template writes: the first that reads back what the template was made to write."""

from __future__ import annotations

import json
from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from specexec.pieces import Call
from specexec.text.formats.format import Format, FormatEncoding
from specexec.text.formats.kinds import kinds_of
from specexec.text.formats.probe import ANSWER, ARGUMENTS, QUESTION, THOUGHT, Probe, Renders, tools
from specexec.text.formats.shipped import shipped_form
from specexec.text.formats.table import CALLS, CHANNELS, THOUGHTS, CallForm
from specexec.text.template_options import Wishes


class Templates(FormatEncoding, Renders, Hashable, Protocol):
    """What is needed of an Encoding."""

    def encode_rest(self, text: str) -> list[int]: ...

    def template_for(self, wishes: Wishes) -> str: ...


def format_of(encoding: Templates, wishes: Wishes = Wishes()) -> Format:  # noqa: B008  (frozen)
    """How the model behind this chat template writes thoughts and calls."""
    found = _found(encoding, _source(encoding, wishes), _Variables(wishes))
    return replace(found, kinds=kinds_of(wishes.tools))


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
        return Format(encoding, None, refusal="the model has no chat template, so it cannot be given tools")
    probe = Probe(encoding, variables.wishes)
    plain = Format(encoding, probe, kinds=kinds_of(tools()), thinks=_thinks(encoding, source, probe))
    one = probe.answer(calls=1)
    if one is None:
        return replace(plain, refusal="the model's chat template refuses a conversation with a tool call")
    if ARGUMENTS[0][0] not in one.answer:
        return replace(plain, refusal="the model's chat template leaves tool calls out")
    for channels in CHANNELS:
        found = replace(plain, form=channels, thinks=("", ""))
        if channels.channels.message in one.answer and _reads(found, encoding, probe, 1):
            return replace(found, parallel=_reads(found, encoding, probe, len(ARGUMENTS)))
    alike = [form for form in CALLS if form.shape.begin in one.answer]
    for form in sorted(alike, key=lambda form: (not form.shape.begin, not _spelled_so(form, one.answer))):
        found = replace(plain, form=form)
        if _reads(found, encoding, probe, 1):
            return replace(found, parallel=_reads(found, encoding, probe, len(ARGUMENTS)))
    ships: object = getattr(encoding.tokenizer, "response_template", None)
    shipped = shipped_form(ships, encoding.tokenizer.get_added_vocab())
    if shipped is not None and shipped.calls:
        found = replace(plain, form=shipped)
        if _reads(found, encoding, probe, 1):
            return replace(found, parallel=_reads(found, encoding, probe, len(ARGUMENTS)))
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
            if (think in place or answer in place) and all(mark in written + source for mark in (think, answer)):
                return think, answer
    return next(((think, answer) for think, answer in THOUGHTS if think in added and answer in added), ("", ""))


def _spelled_so(form: CallForm, answer: str) -> bool:
    """Whether the template writes this form down to its blank space."""
    return all(text in answer for text in form.shape.literals)


def _reads(form: Format, encoding: Templates, probe: Probe, calls: int) -> bool:
    """Whether this form reads back the probe's calls, and nothing besides."""
    shown = probe.answer(calls=calls)
    if shown is None:
        return False
    ids = encoding.encode_rest(shown.answer)
    ends = {encoding.tokenizer.eos_token_id, *form.control_tokens.intersection(encoding.encode_rest(probe.ending()))}
    size = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    piece = form.reader(encoding.encode_rest(shown.prompt)).read(ids[:size], last=True)
    return _values(piece.calls) == [*ARGUMENTS[:calls]] and piece.content.strip() in probe.ending()


def _values(calls: Items[Call]) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def _short(text: str) -> str:
    return repr(text.strip()[:40])
