"""`specexec repl`: raw completion, line by line, with the guesses laid open by /tree."""

from __future__ import annotations

import click

from cli.converse import converse
from cli.engine import running_engine
from cli.options import EngineOptions, engine_options, model_argument, sampling_options
from cli.raw import RawConversation
from cli.screen import Screen
from cli.session import Session
from cli.verbosity import Verbosity, verbosity_options
from specexec.sampling import SamplingParams


@click.command()
@model_argument
@click.option("--tree", is_flag=True, help="Show the guesses of every sweep.")
@click.option("--no-history", is_flag=True, help="Do not remember what is typed.")
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def repl(
    verbosity: Verbosity, tree: bool, no_history: bool, engine_options: EngineOptions, sampling: SamplingParams
) -> int:
    """Let MODEL continue what you type, without a chat template.

    \b
      specexec repl --tree
    """
    screen = Screen(quiet=verbosity.quiet)
    with running_engine(engine_options, screen, verbosity) as engine:
        conversation = RawConversation(engine)
        session = Session(engine, conversation, screen, sampling, engine_options.link_limit, tree=tree)
        return converse(session, history=not no_history)
