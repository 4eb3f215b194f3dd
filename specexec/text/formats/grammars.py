"""The grammar of an answer: a free thought, then calls, text, or text of one shape.

Where the text has a shape, there is at most one thought before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.errors import BadGrammar
from specexec.text.formats.channels import Channels, channel_rules
from specexec.text.formats.marks import Marks
from specexec.text.formats.rules import ANY, Bound, Rules, Whole, tools_of
from specexec.text.formats.table import CallForm


@dataclass(frozen=True)
class Wanted:
    """What an answer may hold.

    Calls of what is `offered`: `choice` is auto, required or a tool's name. In `parallel` there may be several. Text is
    `whole`, or free. Where `thought_open`, the prompt has begun a thought.
    """

    offered: Items[Mapping[str, object]]
    choice: str
    parallel: bool = True
    whole: Whole | None = None
    thought_open: bool = False


def answer_of_shape(marks: Marks, thinks: tuple[str, str], whole: Whole, thought_open: bool) -> Bound:
    """Nothing but text of one shape."""
    rules = Rules(marks)
    body = whole.rule(rules)
    rules.add("start", f"{_thought(rules, thinks, thought_open)} {body}")
    return Bound(rules.text)


def answer_with_calls(
    marks: Marks,
    thinks: tuple[str, str],
    form: CallForm,
    wanted: Wanted,
) -> Bound:
    """Calls in the family's own spelling, which must or may come; where they may, else text, or text of one shape."""
    tools, notes = tools_of(wanted.offered, wanted.choice)
    if not tools:
        raise _no_tool(notes)
    choice, whole, parallel = wanted.choice, wanted.whole, wanted.parallel
    rules = Rules(marks)
    rest = form.shape.rules(rules, tools, parallel)
    thought = _thought(rules, thinks, wanted.thought_open)
    if choice == "auto" and whole is None:
        body = _maybe(rules, form, rest, parallel, thinks)
    else:
        space = rules.add("SPACE", r"/\n{0,2}/")
        silent = f"({_silent(rules, form)} {space})*" if form.silent else ""
        body = f"{rules.literal(_mark(form))} {_after_mark(rules, form, rest, parallel)}"
        if choice == "auto" and whole is not None:
            body = f"({body} | {whole.rule(rules)} {silent})"
        body = f"{space} {silent} {body}"
    rules.add("start", f"{thought} {body}")
    return Bound(rules.text, tuple(notes))


def answer_in_channels(
    marks: Marks,
    channels: Channels,
    wanted: Wanted,
) -> Bound:
    """The same where an answer is made of messages."""
    tools, notes = tools_of(wanted.offered, wanted.choice)
    if wanted.whole is None and not tools:
        raise _no_tool(notes)
    rules = Rules(marks)
    text = wanted.whole.rule(rules) if wanted.whole is not None else None
    rules.add("start", channel_rules(rules, channels, tools, wanted.choice, wanted.parallel, text, wanted.thought_open))
    return Bound(rules.text, tuple(notes))


def _no_tool(notes: Items[str]) -> BadGrammar:
    return BadGrammar("there is no tool that could be called.", "; ".join(notes) or None)


def _mark(form: CallForm) -> str:
    """What shows that calls come."""
    return form.around[0] or form.shape.begin


def _after_mark(rules: Rules, form: CallForm, rest: str, parallel: bool) -> str:
    """One call or several, from behind their first mark."""
    (first, after), (lead, between, trail) = form.around, form.blank
    opened = rules.literal(lead + form.shape.begin) if first else ""
    more = f"({rules.literal(between + form.shape.begin)} {rest})*" if parallel and form.repeats else ""
    closed = rules.literal(trail + after) if after else ""
    return rules.add("section", f"{opened} {rest} {more} {closed}")


def _maybe(rules: Rules, form: CallForm, rest: str, parallel: bool, thinks: tuple[str, str]) -> str:
    """Text, and then calls if the model likes."""
    mark = _mark(form)
    if not mark:
        rules.add("TEXT", r"/([^{\[](.|\n)*)?/")
        return rules.add("answer", f"{rest} | TEXT")
    section = _after_mark(rules, form, rest, parallel)
    text = f"{ANY}{_unlike(rules, thinks)}"
    plain = rules.add("TEXT", text)
    silent = f"({plain} {_silent(rules, form)})* " if form.silent else ""
    return rules.add("answer", f"{silent}({rules.until(mark, text)} {section} | {plain})")


def _silent(rules: Rules, form: CallForm) -> str:
    """Any one of the marks that say nothing."""
    return f"({' | '.join(rules.literal(mark) for mark in form.silent)})"


def _unlike(rules: Rules, thinks: tuple[str, str]) -> str:
    """Text that is no thought, where a thought's mark is text too."""
    think = thinks[0].rstrip()
    spelled = think and not any(isinstance(part, int) for part in rules.marks.parts(think))
    return f" & ~({json.dumps(think)} {ANY})" if spelled else ""


def _thought(rules: Rules, thinks: tuple[str, str], opened: bool) -> str:
    """The rest of a thought that the prompt opened, or one that the model may open, or decline."""
    think, answer = thinks
    if not answer:
        return ""
    blank = rules.add("BLANK", r"/\n{0,2}/")
    thought = rules.until(answer)
    if opened:
        return f"{thought} {blank}"
    return f"({blank} ({rules.literal(think.rstrip())} {thought} | {rules.literal(answer)}) {blank})?"
