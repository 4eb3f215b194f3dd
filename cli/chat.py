"""`specexec chat`: talk to a model, or ask it one thing."""

from __future__ import annotations

import click

from cli.answer import play
from cli.converse import converse
from cli.engine import running_engine
from cli.options import TEXT_OR_FILE, EngineOptions, engine_options, model_argument, sampling_options
from cli.prompts import with_stdin
from cli.screen import Screen
from cli.session import Session
from cli.verbosity import Verbosity, verbosity_options
from specexec.sampling import SamplingParams

# Questions that the demo answers well; a test checks them against its golden answers.
TOY_QUESTIONS = "It answers: How does specexec work? · What is a drafter? · What is offloading?"


@click.command()
@model_argument
@click.option("-p", "--prompt", help="Ask this, print the answer and exit; piped input goes in front.")
@click.option("-s", "--system", type=TEXT_OR_FILE, help="System prompt, or @FILE.")
@click.option("--tree", is_flag=True, help="Show the guesses of every sweep.")
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
    no_history: bool,
    engine_options: EngineOptions,
    sampling: SamplingParams,
) -> int:
    """Talk to MODEL, by default the built-in demo.

    \b
      specexec chat -p "How does specexec work?"
      cat notes.txt | specexec chat -m llama-70b -p "Summarise this."
    """
    message = None if prompt is None else with_stdin(prompt)
    screen = Screen(quiet=verbosity.quiet)
    with running_engine(engine_options, screen, verbosity) as engine:
        session = Session(engine, engine.conversation(system), screen, sampling, engine_options.link_limit, tree=tree)
        if message is None:
            if engine.toy:
                screen.say(TOY_QUESTIONS)
            return converse(session, history=not no_history)
        answer = play(engine, session.conversation.send(message, sampling), screen, tree=tree)
        session.report(answer)
        return answer.exit_code
