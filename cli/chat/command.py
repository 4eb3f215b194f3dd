"""`specexec chat`: talk to a model, or ask it one thing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.chat.archive import Archive, Record, sessions_folder
from cli.chat.engines import ChatEngine, OpenEngine, engines_of, set_thinking
from cli.chat.loop import converse
from cli.chat.room import ON_FULL, OnFull, make_room
from cli.chat.saving import Keeper, stored_name
from cli.chat.session import Session
from cli.connect.engine import ServedEngine
from cli.connect.server import Server, say_without_effect, server_options
from cli.engine.facts import facts_of
from cli.engine.open import running_engine
from cli.engine.prompts import with_stdin
from cli.mcp.options import McpOptions, mcp_options
from cli.mcp.toolbox import Toolbox, opened_toolbox
from cli.shared.control_codes import echo
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import (
    TEXT_OR_FILE,
    EngineOptions,
    JsonSchema,
    WrittenGrammar,
    engine_options,
    model_argument,
    model_was_named,
    prefix_cache_option,
    sampling_options,
)
from cli.shared.presets import preset_option
from cli.shared.template_options import template_options
from cli.shared.thinking import Think, think_option
from cli.shared.verbosity import Verbosity, json_option, verbosity_options
from cli.terminal.answer import Answer
from cli.terminal.display import Display, display_options
from cli.terminal.screen import Screen
from specexec.pieces import Piece
from specexec.sampling.params import SamplingParams
from specexec.stats import Overlap
from specexec.text.messages import content_of, question
from specexec.text.pictures import data_url

if TYPE_CHECKING:
    from cli.chat.saving import KeptConversation
    from specexec.stats import Burst

# Questions that the demo answers well; a test checks them against its golden answers.
TOY_QUESTIONS = "It answers: How does specexec work? · What is a drafter? · What is offloading?"


@click.command(cls=SectionedCommand)
@model_argument
@preset_option
@click.option("-p", "--prompt", help="Ask this, print the answer and exit; piped input goes in front.")
@click.option(
    "-i", "--image", "images", type=click.Path(path_type=Path), multiple=True, help="An image for the first message."
)
@click.option("-s", "--system", type=TEXT_OR_FILE, help="System prompt, or @FILE.")
@click.option("-c", "--continue", "resume", is_flag=True, help="Continue the latest conversation.")
@click.option("--session", metavar="ID", help="Continue this one; see specexec sessions list.")
@server_options(None)
@mcp_options
@click.option("--schema", type=JsonSchema(), help="Every answer is JSON of this schema.")
@click.option("--grammar", type=WrittenGrammar(), help="Every answer follows this grammar, in GBNF or Lark.")
@click.option("--no-save", is_flag=True, help="Do not keep this conversation.")
@click.option("--no-history", is_flag=True, help="Do not remember what is typed.")
@click.option(
    "--on-full",
    type=click.Choice(ON_FULL),
    default="stop",
    show_default=True,
    help="A full context: stop, leave out the oldest turns, or let the model read its own summary of them.",
)
@think_option
@click.option("--bell", is_flag=True, help="Ring when an answer took longer than 10 s.")
@click.option("--notify-command", metavar="COMMAND", help="Run this when an answer took longer than 10 s.")
@display_options
@template_options
@prefix_cache_option
@engine_options
@sampling_options
@json_option("Print the answer to -p, and what came of every option, as JSON.")
@verbosity_options
@click.pass_obj
def chat(
    verbosity: Verbosity,
    prompt: str | None,
    images: tuple[Path, ...],
    system: str | None,
    resume: bool,
    session: str | None,
    connect: str | None,
    api_key: str | None,
    mcp: McpOptions,
    schema: dict[str, object] | None,
    grammar: str | None,
    no_save: bool,
    no_history: bool,
    on_full: OnFull,
    think: Think,
    bell: bool,
    notify_command: str | None,
    display: Display,
    engine_options: EngineOptions,
    sampling: SamplingParams,
    as_json: bool,
) -> int:
    """Talk to MODEL, by default the built-in demo.

    \b
      specexec chat -p "How does specexec work?"
      cat notes.txt | specexec chat -m llama-70b -p "Summarise this."
      specexec chat -m qwen3.6-27b -i photo.jpg -p "What is this?"
      specexec chat -c                                  continue where you left off
      specexec chat --connect http://127.0.0.1:8000     the model that specexec serve has loaded
      specexec chat -m qwen3-8b --mcp "uvx mcp-server-fetch"     with tools
    """
    if as_json and prompt is None:
        raise click.UsageError("--json is for one question: chat -p WORDS, or run MODEL WORDS.")
    if schema is not None and grammar is not None:
        raise click.UsageError("--schema and --grammar both say what an answer looks like: give one of them.")
    message = None if prompt is None else with_stdin(prompt)
    screen = Screen(quiet=verbosity.quiet, plain=display.plain)
    pictures = [data_url(image) for image in images]
    record = _record(resume, session)
    named = model_was_named()
    if record is not None and not named:
        engine_options = replace(engine_options, model=record.model)
    if connect is None:
        opened: OpenEngine = partial(running_engine, screen=screen, verbosity=verbosity)
    else:
        opened = engines_of(Server(connect, api_key), named, screen, verbosity)
        say_without_effect(screen.tell)
    kept = not no_save and (message is None or record is not None)  # a single question is no conversation
    if engine_options.prefix_cache is None:
        engine_options = replace(engine_options, prefix_cache=kept)

    def begin(tools: Toolbox | None, engine: ChatEngine, options: EngineOptions, before: Session | None) -> Session:
        set_thinking(engine, before.think if before else think, screen.say)
        conversation = engine.conversation(system)
        conversation.tools = tools.definitions if tools else ()
        if schema is not None or grammar is not None:
            from specexec.text.formats.rules import Whole

            conversation.whole = Whole(schema, grammar=grammar)
        if before is None:
            talk = Session(
                engine, conversation, screen, sampling, options, display, bell, notify_command, think, on_full,
                once=message is not None and record is None,
            )  # fmt: skip
            talk.pictures += pictures
            talk.tools = tools
        else:
            talk = before.moved(engine, conversation, options)
        if kept:
            earlier = before.keeper.record if before and before.keeper else record
            name = engine.name if isinstance(engine, ServedEngine) else stored_name(options.model)
            talk.keeper = _keeper(engine, conversation, name, earlier, screen)
        if before is None and message is None and engine.toy:
            screen.say(TOY_QUESTIONS)
        return talk

    with opened_toolbox(mcp, screen) as tools:
        if message is None:
            return converse(engine_options, screen, opened, history=not no_history, begin=partial(begin, tools))
        with opened(engine_options) as engine:
            talk = begin(tools, engine, engine_options, None)
            content = content_of(message, pictures)
            if not make_room(talk, [question(content)]):
                assert talk.last is not None
                return talk.last.exit_code
            try:
                if not as_json:
                    *_, answer = talk.exchange(talk.conversation.send(content, sampling))
                    return answer.exit_code
                bursts: list[Burst] = []
                *_, last = talk.exchange(talk.conversation.send(content, sampling), partial(_collected, bursts))
                left_out, said = asdict(talk.conversation.left_out), talk.conversation.messages
                asked: dict[str, object] = {"prompt": message, "system": system, "think": think, "schema": schema}
                asked["grammar"] = grammar
                asked |= {"on_full": on_full, "left_out": left_out, "messages": said}
                echo(json.dumps(asked | _record_of(bursts, engine, engine_options, sampling), ensure_ascii=False))
                return last.exit_code
            finally:
                talk.leave()


def _collected(kept: list[Burst], bursts: Iterator[Burst]) -> Answer:
    """The sum of an answer that is not shown; its bursts are added to `kept`."""
    answer = Answer()
    for burst in bursts:
        kept.append(burst)
        answer = answer.after(burst)
    return answer


def _record_of(
    bursts: list[Burst], engine: ChatEngine, options: EngineOptions, sampling: SamplingParams
) -> dict[str, object]:
    """An answer and everything that led to it."""
    if isinstance(engine, ServedEngine):
        filled, facts = sampling, {"asked": options.asked, "connect": engine.model.server.address, **engine.model.meta}
    else:
        filled, facts = engine.filled(sampling), facts_of(engine, options)
    tokens = sum(len(burst.tokens) for burst in bursts)
    whole = sum((burst.piece for burst in bursts), Piece())
    return {
        "text": whole.content,
        "reasoning": whole.reasoning,
        "calls": [asdict(call) for call in whole.calls],
        "finish_reason": bursts[-1].finish_reason,
        "limit": bursts[-1].limit,
        "completion_tokens": tokens,
        "sweeps": len(bursts),
        "drafted": sum(burst.nodes for burst in bursts),
        "accepted": sum(burst.accepted for burst in bursts),
        "steps_replaced": sum(bool(burst.replaced) for burst in bursts),
        "sweeps_saved": sum(burst.replaced for burst in bursts),
        "unread": bursts[-1].unread,
        "kv_dropped": bursts[-1].kv_dropped,
        "bytes_read": sum(burst.bytes_read for burst in bursts),
        "draft_s": sum(burst.draft_s for burst in bursts),
        "sweep_s": sum(burst.sweep_s for burst in bursts),
        "overlap": asdict(sum((burst.overlap for burst in bursts), Overlap())),
        "sampling": asdict(replace(filled, seed=bursts[-1].seed)),
        "engine": facts,
    }


def _record(resume: bool, session: str | None) -> Record | None:
    """The conversation to continue."""
    if resume and session:
        raise click.UsageError("--continue is the latest conversation, --session another one: give one of them.")
    archive = Archive(sessions_folder()) if resume or session else None
    if archive is None:
        return None
    return archive.load(session) if session else archive.latest()


def _keeper(
    engine: ChatEngine, conversation: KeptConversation, model: str, record: Record | None, screen: Screen
) -> Keeper:
    """Keeps this conversation from now on, and takes up what `record` holds."""
    archive = Archive(sessions_folder())
    keeper = Keeper(archive, record or archive.new(model), engine, conversation, screen)
    keeper.resume(model)
    return keeper
