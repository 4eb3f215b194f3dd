"""How much the user wants to hear: -q and -v, before or after the command's name."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


@dataclass
class Verbosity:
    """One per run, shared by every command through click's context."""

    quiet: bool = False
    verbose: int = 0

    @property
    def traceback(self) -> bool:
        """Whether a bug shows where it happened."""
        return self.verbose >= 2 or os.environ.get("SPECEXEC_DEBUG", "0") not in ("", "0")


def verbosity_options(command: Command) -> Command:
    """Add -q and -v; the values land in the run's Verbosity, not in the command's arguments."""
    verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        show_default=False,
        expose_value=False,
        callback=_count,
        help="Say more; -vv adds tracebacks.",
    )
    quiet = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_hush, help="Answers and errors only."
    )
    return quiet(verbose(command))


def start_logging(verbosity: Verbosity) -> None:
    """Our own notes from warnings upwards; more with -v. Other libraries are heard only with -v."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Note())
    ours = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbosity.verbose, 2)]
    theirs = [logging.ERROR, logging.WARNING, logging.WARNING, logging.INFO][min(verbosity.verbose, 3)]
    logging.basicConfig(level=theirs, handlers=[handler], force=True)
    for name in ("specexec", "offload", "cli"):
        logging.getLogger(name).setLevel(logging.ERROR if verbosity.quiet else ours)
    # transformers sets its own level at import and listens to nothing else.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", logging.getLevelName(theirs).lower())


class _Note(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        kind = "Note" if record.levelno == logging.WARNING else record.levelname.capitalize()
        return f"{kind}: {super().format(record)}"


def _count(context: click.Context, _: click.Parameter, value: int) -> None:
    context.ensure_object(Verbosity).verbose += value


def _hush(context: click.Context, _: click.Parameter, value: bool) -> None:
    verbosity = context.ensure_object(Verbosity)
    verbosity.quiet = verbosity.quiet or value
