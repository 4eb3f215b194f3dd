"""How much a model thinks before it answers: a level on the command line, and the template variables it becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import click

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

Think: TypeAlias = Literal["auto", "off", "on", "low", "medium", "high"]
LEVELS: tuple[Think, ...] = ("auto", "off", "on", "low", "medium", "high")

Command = TypeVar("Command", bound=Callable[..., object])


def think_option(command: Command) -> Command:
    """Add --think; the command receives `think`."""
    return click.option(
        "--think",
        type=click.Choice(LEVELS),
        default="auto",
        help="How much to think before an answer, if the chat template can vary it; auto: its default.",
    )(command)


def ask_to_think(engine: Engine, level: Think, tell: Callable[[str], None]) -> None:
    """Set it for the chat template from now on; `tell` is called with what that does, or that it does nothing."""
    engine.encoding.thinking = {}
    if level != "auto":
        from specexec.text.formats import format_of

        thinking = format_of(engine.encoding).thinking(level)
        engine.encoding.thinking = thinking.variables
        does = "" if thinking.variables else "has no effect; "
        tell(f"think {level}: {does}{thinking.effect}")
