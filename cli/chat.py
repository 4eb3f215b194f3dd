"""`specexec chat`: talk to a model, or ask it one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from cli.archive import Archive, Record, sessions_folder
from cli.converse import converse
from cli.engine import running_engine
from cli.keeping import Keeper, stored_name
from cli.options import TEXT_OR_FILE, EngineOptions, engine_options, model_argument, sampling_options
from cli.prompts import with_stdin
from cli.screen import Screen
from cli.session import Session
from cli.verbosity import Verbosity, verbosity_options
from specexec.sampling import SamplingParams

if TYPE_CHECKING:
    from specexec.conversation import Conversation

# Questions that the demo answers well; a test checks them against its golden answers.
TOY_QUESTIONS = "It answers: How does specexec work? · What is a drafter? · What is offloading?"


@click.command()
@model_argument
@click.option("-p", "--prompt", help="Ask this, print the answer and exit; piped input goes in front.")
@click.option("-s", "--system", type=TEXT_OR_FILE, help="System prompt, or @FILE.")
@click.option("--tree", is_flag=True, help="Show the guesses of every sweep.")
@click.option("-c", "--continue", "resume", is_flag=True, help="Go on with the latest conversation.")
@click.option("--session", metavar="ID", help="Go on with this one; see specexec sessions list.")
@click.option("--no-save", is_flag=True, help="Do not keep this conversation.")
@click.option("--bell", is_flag=True, help="Ring when an answer took longer than 10 s.")
@click.option("--no-history", is_flag=True, help="Do not remember what is typed.")
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def chat(
    verbosity: Verbosity,
    prompt: str | None,
    system: str | None,
    tree: bool,
    resume: bool,
    session: str | None,
    no_save: bool,
    bell: bool,
    no_history: bool,
    engine_options: EngineOptions,
    sampling: SamplingParams,
) -> int:
    """Talk to MODEL, by default the built-in demo.

    \b
      specexec chat -p "How does specexec work?"
      cat notes.txt | specexec chat -m llama-70b -p "Summarise this."
      specexec chat -c                                  go on where you left off
    """
    message = None if prompt is None else with_stdin(prompt)
    screen = Screen(quiet=verbosity.quiet)
    record = _record(resume, session)
    if record is not None and not _model_was_named():
        engine_options = replace(engine_options, model=record.model)
    with running_engine(engine_options, screen, verbosity) as engine:
        conversation = engine.conversation(system)
        talk = Session(engine, conversation, screen, sampling, engine_options.link_limit, tree=tree, bell=bell)
        if not no_save and (message is None or record is not None):  # a single question is nobody's conversation
            talk.keeper = _keeper(engine_options.model, record, talk, conversation)
        try:
            if message is None:
                if engine.toy:
                    screen.say(TOY_QUESTIONS)
                return converse(talk, history=not no_history)
            answer = talk.play(talk.conversation.send(message, sampling))
            talk.report(answer)
            return answer.exit_code
        finally:
            if talk.keeper is not None:
                talk.keeper.leave()


def _record(resume: bool, session: str | None) -> Record | None:
    """The conversation to go on with."""
    if resume and session:
        raise click.UsageError("--continue is the latest conversation, --session another one: give one of them.")
    archive = Archive(sessions_folder()) if resume or session else None
    if archive is None:
        return None
    return archive.load(session) if session else archive.latest()


def _model_was_named() -> bool:
    """Whether this command line says which model; a conversation keeps its own otherwise."""
    context = click.get_current_context()
    typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return any(context.get_parameter_source(name) in typed for name in ("model", "positional_model"))


def _keeper(model: str, record: Record | None, talk: Session, conversation: Conversation) -> Keeper:
    archive = Archive(sessions_folder())
    kept = record or archive.new(stored_name(model))
    keeper = Keeper(archive, kept, talk.engine, conversation, talk.screen)
    if record is not None:
        keeper.resume()
    return keeper
