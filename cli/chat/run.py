"""`specexec run`: a question as it is typed elsewhere, `run MODEL "words"`; without words a conversation."""

from __future__ import annotations

import sys

import click

from cli.chat.command import chat
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import was_chosen


def _run(positional_model: str | None, model: str | None, words: tuple[str, ...], **rest: object) -> object:
    """What was typed, else what is piped in, else a conversation."""
    if was_chosen("model"):
        positional_model, words = None, (*filter(None, [positional_model]), *words)
    elif positional_model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    piped = None if sys.stdin.isatty() else ""
    assert chat.callback is not None
    return chat.callback(prompt=" ".join(words) or piped, positional_model=positional_model, model=model, **rest)


run = SectionedCommand(
    "run",
    params=[
        click.Argument(["positional_model"], metavar="MODEL", required=False),
        click.Argument(["words"], metavar="[WORDS]...", nargs=-1),
        *(one for one in chat.params if isinstance(one, click.Option) and one.name != "prompt"),
    ],
    callback=_run,
    help="""Ask MODEL one thing, or talk to it.

    It answers what the WORDS say and exits; without words it is `specexec chat MODEL`. What is piped in goes in front
    of the words, or is the question. With -m, or a preset that has a model, all words are the question.

    \b
      specexec run demo How does specexec work?
      specexec run demo < question.txt
    """,
)
