"""Slash commands about how answers are made and shown: sampling, budget, models, and what appears on the screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from difflib import get_close_matches

import click

from cli.chat.engines import introduced, planned, set_thinking, template_of
from cli.chat.raw import RawConversation
from cli.chat.room import ON_FULL
from cli.chat.session import Session
from cli.connect.engine import ServedEngine
from cli.shared.options import BUDGET, SAMPLING_TYPES
from cli.shared.quantities import format_count
from cli.shared.thinking import LEVELS
from cli.terminal.answer import long_stats
from cli.terminal.treeview import draw
from offload.hub import names
from specexec.drafters.registry import check_models, parse
from specexec.sampling.params import SamplingParams

NOT_OURS = "the {0} is the server's: it is chosen where specexec serve is started"
VIEWS = ("model", "sampling", "plan", "template", "prompt")
SETTINGS = [field.name for field in fields(SamplingParams) if field.name in (*SAMPLING_TYPES, "stop", "ignore_eos")]


def keys() -> Iterable[str]:
    return [f"{key} " for key in SETTINGS]


def set_value(session: Session, argument: str) -> None:
    key, _, value = argument.partition(" ")
    key, value = key.replace("-", "_"), value.strip()
    if not key:
        raise click.BadParameter("which setting? /set KEY VALUE; /show sampling lists them")
    if key not in SETTINGS:
        near = get_close_matches(key, SETTINGS, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else "/show lists all."
        raise click.BadParameter(f"/set knows no {key!r}; {meant}")
    session.sampling = replace(session.sampling, **{key: _value(key, value)})  # type: ignore[arg-type]  # _value checks
    session.screen.tell(f"{key} = {_in_words(session, key)}")


def _in_words(session: Session, key: str) -> str:
    """A setting as it will be obeyed, and who chose it."""
    value, whose, engine = getattr(session.sampling, key), "", session.engine
    if value is None and key == "seed":
        return "another for every answer"
    if value is None:
        if isinstance(engine, ServedEngine):
            return "the model's own"
        value, whose = getattr(engine.filled(session.sampling), key), ", the model's own"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return (", ".join(map(repr, value)) or "none") + whose
    return f"{value}{whose}"


def _value(key: str, value: str) -> object:
    if key == "stop":
        return (value,) if value else ()
    if key == "ignore_eos":
        return click.BOOL.convert(value, None, None)
    if key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed") and value in (
        "",
        "none",
        "auto",
    ):
        return None  # back to the model's default, or to a random seed
    return SAMPLING_TYPES[key].convert(value, None, None)


def show(session: Session, argument: str) -> None:
    if argument and argument not in VIEWS:
        near = get_close_matches(argument, VIEWS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise click.BadParameter(f"/show knows {', '.join(VIEWS)}{meant}")
    sampling = [f"  {key:<19} {_in_words(session, key)}" for key in SETTINGS]
    lines = {
        "": lambda: [*introduced(session.engine), f"  {'system':<19} {_system(session)}", *sampling],
        "model": lambda: introduced(session.engine),
        "sampling": lambda: sampling,
        "plan": lambda: planned(session.engine),
        "template": lambda: [template_of(session.engine) or "this model has no chat template"],
        "prompt": lambda: [session.conversation.rendered],
    }[argument]
    session.screen.tell("\n".join(lines()), folded=argument not in ("template", "prompt"))


def _system(session: Session) -> str:
    return session.conversation.system or "(none)"


def model(session: Session, argument: str) -> None:
    engine = session.engine
    known = engine.names if isinstance(engine, ServedEngine) else [*model_names()]
    if not argument:
        now = engine.name if isinstance(engine, ServedEngine) else session.options.model
        session.screen.tell(f"{now}; known names: {', '.join(known)}")
        return
    if not isinstance(engine, ServedEngine):
        names.resolve(argument, offline=True)  # nothing is downloaded in the middle of a conversation
    elif argument not in known:
        raise click.BadParameter(f"the server has no model {argument!r}; it has {', '.join(known)}")
    # --trust-remote-code was given for the model that was named with it.
    other = session.options.but(drafter="auto", trust_remote_code=False)
    session.switch = replace(other, model=argument)


def model_names() -> Iterable[str]:
    return [names.DEMO, *names.aliases()]


def drafter(session: Session, argument: str) -> None:
    if not argument:
        session.screen.tell(f"drafter {session.engine.drafter_name}")
        return
    if isinstance(session.engine, ServedEngine):
        raise click.BadParameter(NOT_OURS.format("drafter"))
    choice = parse(argument, names.known)
    pair = names.resolve(session.options.model, choice.models, offline=True)  # as for /model
    check_models(choice, pair.drafters, pair.name)
    session.switch = session.options.but(drafter=argument)


def budget(session: Session, argument: str) -> None:
    engine = session.engine
    before = engine.budget
    if not argument:
        session.screen.tell(f"budget {before}")
    elif isinstance(engine, ServedEngine):
        raise click.BadParameter(NOT_OURS.format("budget"))
    else:
        engine.budget = BUDGET(argument)
        session.screen.tell(f"budget {engine.budget} (was {before})")


def stats(session: Session, argument: str) -> None:
    if argument == "long":
        if session.last is None or not session.last.tokens:
            session.screen.tell("no answer yet")
        else:
            session.screen.tell("\n".join(long_stats(session.last, session.engine.placement)))
        return
    session.display.stats = _on_or_off(argument, not session.display.stats)
    session.screen.tell(f"stats {'on' if session.display.stats else 'off'}")


def tree(session: Session, argument: str) -> None:
    if argument:
        session.display.tree = _on_or_off(argument, session.display.tree)
        session.screen.tell(f"tree {'on' if session.display.tree else 'off'}")
    elif session.last is None or session.last.last is None:
        session.screen.tell("no sweep yet; /tree on shows every one as it comes")
    else:
        burst, number = session.last.last, session.last.sweeps
        engine = session.engine
        session.screen.tell(draw(burst, engine.decode, session.screen.width, number, engine.drafter_name))


def think(session: Session, argument: str) -> None:
    if argument in LEVELS:
        session.think = argument
        set_thinking(session.engine, session.think, session.screen.tell)
        if argument == "auto":
            session.screen.tell("think auto: the chat template's own default")
    elif argument in ("hide", "show"):
        session.display.hide_thinking = argument == "hide"
        session.screen.tell(f"thoughts are {'counted only' if session.display.hide_thinking else 'shown'}")
    elif argument:
        raise click.BadParameter(f"/think {', '.join(LEVELS)}: how much; /think hide or show is about the screen")
    else:
        thoughts = session.last_answer.get("reasoning_content")
        session.screen.tell(str(thoughts or "no thoughts before the last answer"))


def markdown(session: Session, argument: str) -> None:
    session.display.markdown = _on_or_off(argument, not session.display.markdown)
    session.screen.tell(f"markdown {'on' if session.display.markdown else 'off'}")


def tools(session: Session, _: str) -> None:
    if session.tools is None:
        session.screen.tell("no tools; specexec chat --mcp SERVER brings some")
    else:
        session.screen.tell("\n".join(session.tools.lines))


def tokens(session: Session, _: str) -> None:
    used, context = session.conversation.tokens_used, session.engine.context
    left = format_count(max(0, context - used))
    session.screen.tell(f"context {format_count(used)} of {format_count(context)} tokens, {left} left")


def on_full(session: Session, argument: str) -> None:
    if isinstance(session.conversation, RawConversation):
        raise click.BadParameter("plain completion keeps nothing that could fill the context; it is for specexec chat")
    if argument:
        session.on_full = click.Choice(ON_FULL).convert(argument, None, None)
    session.screen.tell(f"on-full {session.on_full}")


def _on_or_off(argument: str, otherwise: bool) -> bool:
    return bool(click.BOOL.convert(argument, None, None)) if argument else otherwise
