"""Where the user's lines come from: a real line editor on a terminal, plain reading everywhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cli.screen import Screen

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "› "


class Lines(Protocol):
    """Gives one message at a time. Ctrl-C is KeyboardInterrupt, the end is None."""

    hint: str

    def read(self) -> str | None: ...


def open_lines(screen: Screen, words: list[str], *, history: bool) -> Lines:
    """The best reader this terminal allows; `words` complete after a slash."""
    if sys.stdin.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return EditedLines(words, history_path() if history else None)
    return PlainLines(screen)


def history_path() -> Path:
    """The history file, made readable by its owner alone before anything is written to it."""
    from platformdirs import user_state_path

    path = user_state_path("specexec") / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)
    return path


class PlainLines:
    """Standard input, line by line; a prompt only where somebody may be typing."""

    hint = "Enter sends · Ctrl-C stops · Ctrl-D leaves · /help"

    def __init__(self, screen: Screen) -> None:
        self._prompted = sys.stdin.isatty() and not screen.quiet

    def read(self) -> str | None:
        if self._prompted:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None


class EditedLines:
    """prompt_toolkit: history, completion, several lines. It draws on stderr, so that stdout holds answers only."""

    hint = "Enter sends · Alt-Enter new line · Ctrl-C stops · Ctrl-D leaves · /help"

    def __init__(self, words: list[str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=FileHistory(history) if history else InMemoryHistory(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=WordCompleter([f"/{word}" for word in words], sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str | None:
        try:
            return self._session.prompt()
        except EOFError:
            return None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
