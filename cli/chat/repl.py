"""`specexec repl`: raw completion, line by line; /tree shows the guesses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from cli.chat.loop import converse
from cli.chat.raw import RawConversation
from cli.chat.session import Session
from cli.engine.open import running_engine
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import EngineOptions, engine_options, model_argument, prefix_cache_option, sampling_options
from cli.shared.template_options import control_option
from cli.shared.verbosity import Verbosity, verbosity_options
from cli.terminal.display import Display, display_options
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.engine.engine import Engine


@click.command(cls=SectionedCommand)
@model_argument
@click.option("--no-history", is_flag=True, help="Do not remember what is typed.")
@display_options
@control_option
@prefix_cache_option
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def repl(
    verbosity: Verbosity, no_history: bool, display: Display, engine_options: EngineOptions, sampling: SamplingParams
) -> int:
    """Let MODEL continue what you type, without a chat template.

    \b
      specexec repl --tree
    """
    screen = Screen(quiet=verbosity.quiet, plain=display.plain)

    def begin(engine: Engine, options: EngineOptions, before: Session | None) -> Session:
        if before is not None:
            return before.moved(engine, RawConversation(engine), options)
        # What is continued is not an answer, and rarely Markdown.
        return Session(engine, RawConversation(engine), screen, sampling, options, replace(display, markdown=False))

    opened = partial(running_engine, screen=screen, verbosity=verbosity)
    return converse(engine_options, screen, opened, history=not no_history, begin=begin)
