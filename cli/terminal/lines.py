"""Where the user's lines come from: a real line editor on a terminal, plain reading everywhere else."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cli.terminal.screen import Screen
from offload.machine.folders import folder_of
from specexec.errors import BadText

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "› "
QUOTES = '"""'
HINTS = (
    "/read FILE adds a file", "/tree shows the guesses", "Alt-Enter begins a new line", "/retry answers again",
    "Ctrl-R searches what you typed", "/stats long shows where the time went", "/edit opens your editor",
)  # fmt: skip


class Command(Protocol):
    """What may follow a slash command's name."""

    @property
    def words(self) -> Callable[[], Iterable[str]]: ...

    @property
    def takes_path(self) -> bool: ...


class Lines(Protocol):
    """Gives one message at a time. Ctrl-C is KeyboardInterrupt, the end is None."""

    hint: str

    def read(self) -> str | None: ...


def open_lines(screen: Screen, commands: Mapping[str, Command], *, history: bool) -> Lines:
    """The best reader this terminal allows; `commands` complete after a slash."""
    if can_ask() and os.environ.get("TERM") != "dumb":
        return EditedLines(commands, history_path() if history else None)
    return PlainLines(screen)


def can_ask() -> bool:
    """Whether a user sees a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def asked(question: str) -> str:
    """What is typed from now on, up to the end of the line; empty where the input ends."""
    import termios

    termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed before the question is no answer to it
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def history_path() -> Path:
    """The history file, made readable by its owner alone before anything is written to it."""
    path = folder_of("state") / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)
    return path


def unfinished(text: str) -> bool:
    """Whether three quotes have been opened and not closed."""
    start = text.lstrip()
    return start.startswith(QUOTES) and QUOTES not in start.removeprefix(QUOTES)


def without_quotes(text: str) -> str:
    """What is between three quotes at both ends; other text as it is."""
    bare = text.strip()
    if len(bare) < 2 * len(QUOTES) or not (bare.startswith(QUOTES) and bare.endswith(QUOTES)):
        return text
    return bare.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


class PlainLines:
    """Standard input, line by line; a prompt only at a terminal."""

    hint = "Enter sends · Ctrl-C stops · Ctrl-D leaves · /help"

    def __init__(self, screen: Screen) -> None:
        self._prompted = sys.stdin.isatty() and not screen.quiet

    def read(self) -> str | None:
        text = ""
        while not text or unfinished(text):
            if self._prompted:
                print("  " if text else PROMPT, end="", file=sys.stderr, flush=True)
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError:
                raise BadText("standard input is not UTF-8 text.") from None
            if not line:
                break
            text += line
        return without_quotes(text.rstrip("\n")) if text else None


class EditedLines:
    """prompt_toolkit: history, completion, several lines. It draws on stderr, so that stdout holds answers only."""

    hint = "Enter sends · Alt-Enter new line · Ctrl-C stops · Ctrl-D leaves · /help"

    def __init__(self, commands: Mapping[str, Command], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import create_output

        from cli.terminal.completer import SlashCompleter

        self._hints = itertools.cycle(HINTS)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=FileHistory(history) if history else InMemoryHistory(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=SlashCompleter(commands),
            complete_while_typing=False,
            enable_open_in_editor=True,
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str | None:
        try:
            return without_quotes(self._session.prompt(placeholder=[("class:auto-suggestion", next(self._hints))]))
        except EOFError:
            return None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        if unfinished(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
