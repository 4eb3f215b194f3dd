"""Where results go: into a journal, into one text file each, or to standard output in the order of the input."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cli.batch.files import on_disk, replace_file
from cli.batch.formats import Writer, line_of
from cli.batch.items import Item
from cli.batch.journal import Journal
from cli.errors import OutputExists
from cli.screen import Screen

if TYPE_CHECKING:
    from specexec.stats import Completion

TEXTS = (".txt", ".md", ".markdown")
LONGEST_NAME = 120


class Sink(Protocol):
    """Takes each item's end exactly once. `keeps_partial`: unfinished answers need not be shown, they will go on."""

    keeps_partial: bool

    def finished(self, item: Item, answer: Completion) -> None: ...

    def failed(self, item: Item, error: Exception) -> None: ...


@dataclass
class JournalSink:
    """Records, as items finish; with `folder` each text in a file of its own first."""

    journal: Journal
    writer: Writer
    folder: Folder | None = None
    keeps_partial: bool = True

    def finished(self, item: Item, answer: Completion) -> None:
        if self.folder is not None:
            self.folder.put(item, answer.text)
        self.journal.put(self.writer.finished(item, answer))

    def failed(self, item: Item, error: Exception) -> None:
        self.journal.put(self.writer.failed(item, error))


@dataclass
class Folder:
    """One text file for each item, named after its id. Names never lead out of the folder and never collide."""

    path: Path
    names: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(path: Path, ids: Iterable[str]) -> Folder:
        """The folder of a run, every name decided before the first file is written.

        `ids` are those of all items, also of earlier runs: a name that was one's own must not become another's.
        """
        wanted = {name: _file_name(name) for name in ids}
        crowd = Counter(file.casefold() for file in wanted.values())  # some disks do not tell A from a
        return Folder(
            path, {name: _marked(file, name) if crowd[file.casefold()] > 1 else file for name, file in wanted.items()}
        )

    def check_new(self) -> None:
        """Refuse to replace what somebody else has put there."""
        taken = next((file for name in self.names.values() if (file := self.path / name).exists()), None)
        if taken is not None:
            raise OutputExists(f"{taken} already exists.", hint="another --output-dir, or --overwrite.")

    def put(self, item: Item, text: str) -> None:
        file = self.path / self.names[item.id]
        with on_disk(file, repr(item.id)):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, text + "\n")


def _file_name(name: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    safe = "/".join(re.sub(r"[^\w.\- ]", "-", part)[-LONGEST_NAME:].lstrip(".") for part in parts) or "item"
    file = safe if Path(safe).suffix in TEXTS else f"{safe}.txt"
    return file if safe == name else _marked(file, name) if safe.count("/") != len(parts) - 1 else file


def _marked(file: str, name: str) -> str:
    """The same name with a few letters that no other id has."""
    path = Path(file)
    return str(path.with_name(f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}{path.suffix}"))


@dataclass
class ScreenSink:
    """Standard output, in the order of the input: a result waits for those before it."""

    screen: Screen
    order: list[int]
    writer: Writer
    as_json: bool
    keeps_partial: bool = False
    _waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    _next: int = 0

    def finished(self, item: Item, answer: Completion) -> None:
        record = self.writer.finished(item, answer)
        self._put(item, lambda: self._show(line_of(record).decode() if self.as_json else answer.text))

    def failed(self, item: Item, error: Exception) -> None:
        record = self.writer.failed(item, error)
        self._put(item, lambda: self._show(line_of(record).decode() if self.as_json else ""))

    def flush(self) -> None:
        """Show what has been waiting for something that will not come."""
        for index in sorted(self._waiting):
            self._waiting.pop(index)()

    def _put(self, item: Item, show: Callable[[], None]) -> None:
        self._waiting[item.index] = show
        while self._next < len(self.order) and self.order[self._next] in self._waiting:
            self._waiting.pop(self.order[self._next])()
            self._next += 1

    def _show(self, text: str) -> None:
        if text:
            self.screen.write(text)
            self.screen.end_line()
