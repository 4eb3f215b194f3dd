"""Completion of a line that begins with a slash: the command, then its possible values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from cli.terminal.lines import Command


class SlashCompleter(Completer):
    """Asks the commands themselves, each time: models and conversations come and go."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        command = self._commands.get(name.removeprefix("/"))
        if not name.startswith("/") or "\n" in document.text:
            return
        if not space:
            yield from (Completion(f"/{word}", -len(name)) for word in self._commands if f"/{word}".startswith(name))
        elif command is not None and command.takes_path:
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif command is not None:
            words = (word for word in command.words() if word.startswith(argument))
            yield from (Completion(word, -len(argument)) for word in words)
