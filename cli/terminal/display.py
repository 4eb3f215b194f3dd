"""What of an answer is shown, and how: options of every command with a dialogue, changed later by slash commands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import click

Result = TypeVar("Result")


@dataclass
class Display:
    """One per run."""

    tree: bool = False
    stats: bool = True
    markdown: bool = True
    hide_thinking: bool = False
    plain: bool = False


_OPTIONS = (
    click.option("--tree", is_flag=True, help="Show the guesses of every sweep."),
    click.option("--stats/--no-stats", default=True, help="Sum up every answer in a line."),
    click.option("--markdown/--no-markdown", default=True, help="Draw Markdown on a terminal."),
    click.option("--hide-thinking", is_flag=True, help="Count a model's thoughts instead of showing them."),
    click.option("--plain", is_flag=True, help="No colours, no live lines: for screen readers and logs."),
)


def display_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add them; the command receives one `display: Display`."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        chosen = {field.name: bool(arguments.pop(field.name)) for field in fields(Display)}
        return command(display=Display(**chosen), **arguments)

    decorated: Callable[..., Result] = collected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
