"""How much is logged, and where: -q, -v, --log-file and --json, before or after the command's name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click

from cli.shared.control_codes import echo

Command = TypeVar("Command", bound=Callable[..., object])

OURS = ("specexec", "offload", "cli")


@dataclass
class Verbosity:
    """One per run, shared by every command through click's context. `json`: the caller reads JSON, errors too."""

    quiet: bool = False
    verbose: int = 0
    json: bool = False
    log_file: Path | None = None
    log_json: bool = False

    @property
    def traceback(self) -> bool:
        """Whether a bug shows where it happened."""
        return self.verbose >= 2 or os.environ.get("SPECEXEC_DEBUG", "0") not in ("", "0")


def verbosity_options(command: Command) -> Command:
    """Add -q, -v, --color and what is logged; the values land in the run's Verbosity, not in the arguments."""
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
    log_file = click.option(
        "--log-file",
        type=click.Path(dir_okay=False, path_type=Path),
        expose_value=False,
        callback=_log_to,
        help="Add everything worth knowing to this file.",
    )
    log_json = click.option(
        "--log-json",
        is_flag=True,
        expose_value=False,
        callback=_log_as_json,
        help="One JSON object a line in it.",
    )
    color = click.option(
        "--color",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        expose_value=False,
        callback=_colour,
        help="NO_COLOR and FORCE_COLOR say the same.",
    )
    return quiet(verbose(log_file(log_json(color(command)))))


def json_option(says: str = "Print JSON.") -> Callable[[Command], Command]:
    """Add --json; the command receives `as_json`, and an error becomes JSON as well."""
    return click.option("--json", "as_json", is_flag=True, callback=_want_json, help=says)


def start_logging(verbosity: Verbosity, tell: Callable[[str], None] | None = None) -> None:
    """Our own notes from warnings upwards; more with -v. Those of other libraries only with -v.

    `tell` prints a line where something else is on the screen.
    """
    loudness = _Loudness(verbosity)
    handlers: list[logging.Handler] = [_NoteHandler(tell)]
    handlers[0].addFilter(loudness.admits)
    if verbosity.log_file is not None:
        handlers.append(_file_handler(verbosity.log_file, as_json=verbosity.log_json))
    logging.basicConfig(level=loudness.theirs, handlers=handlers, force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbosity.log_file is not None else loudness.ours)
    # transformers sets its own level at import and listens to nothing else.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", logging.getLevelName(loudness.theirs).lower())


class _Loudness:
    """From which level on something is said aloud."""

    def __init__(self, verbosity: Verbosity) -> None:
        ours = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbosity.verbose, 2)]
        self.ours = logging.ERROR if verbosity.quiet else ours
        self.theirs = [logging.ERROR, logging.WARNING, logging.WARNING, logging.INFO][min(verbosity.verbose, 3)]

    def admits(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (self.ours if record.name.partition(".")[0] in OURS else self.theirs)


class _NoteHandler(logging.Handler):
    """Says notes on stderr, or through the owner of the screen; each once."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))  # or basicConfig puts names of modules before it
        self._said: set[str] = set()
        self._tell = tell or (lambda line: echo(line, err=True))

    def emit(self, record: logging.LogRecord) -> None:
        kind = "Note" if record.levelno == logging.WARNING else record.levelname.capitalize()
        note = f"{kind}: {self.format(record)}"
        if note not in self._said:
            self._said.add(note)
            self._tell(note)


def _file_handler(path: Path, *, as_json: bool) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if as_json else plain)
    return handler


class _JsonLines(logging.Formatter):
    """One object a line; a traceback is a text inside it."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _count(context: click.Context, _: click.Parameter, value: int) -> None:
    context.ensure_object(Verbosity).verbose += value


def _hush(context: click.Context, _: click.Parameter, value: bool) -> None:
    verbosity = context.ensure_object(Verbosity)
    verbosity.quiet = verbosity.quiet or value


def _want_json(context: click.Context, _: click.Parameter, value: bool) -> bool:
    verbosity = context.ensure_object(Verbosity)
    verbosity.json = verbosity.json or value
    return value


def _log_as_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    verbosity = context.ensure_object(Verbosity)
    verbosity.log_json = verbosity.log_json or value


def _colour(_context: click.Context, _: click.Parameter, value: str) -> None:
    """The two variables are what every library around us listens to as well."""
    if value != "auto":
        os.environ.pop("FORCE_COLOR" if value == "never" else "NO_COLOR", None)
        os.environ["NO_COLOR" if value == "never" else "FORCE_COLOR"] = "1"


def _log_to(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    try:
        os.close(os.open(value, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError as problem:
        raise click.BadParameter(f"{value} cannot be written: {problem.strerror}.", context, parameter) from None
    context.ensure_object(Verbosity).log_file = value
