"""Where results go: a journal, one text file each, or standard output in the order of the input."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from cli.batch.input.items import Item
from cli.batch.output.files import on_disk, replace_file
from cli.batch.output.formats import RecordWriter, line_of
from cli.batch.output.journal import Journal
from cli.shared.errors import OutputFileExists
from cli.terminal.screen import Screen

if TYPE_CHECKING:
    from cli.batch.output.answers import ItemAnswer

TEXTS = (".txt", ".md", ".markdown")
LONGEST_NAME_B = 200  # disks take 255 bytes; a mark, a suffix and a hidden name for the unfinished file come on top
LONGEST_PATH_B = 1000


class Sink(Protocol):
    """Takes each item's end exactly once. `keeps_partial`: unfinished answers need not be shown, they will go on."""

    keeps_partial: bool

    def finished(self, item: Item, answer: ItemAnswer) -> None: ...

    def failed(self, item: Item, error: Exception) -> None: ...


@dataclass
class JournalSink:
    """Records, as items finish; with `folder` each text in a file of its own first, which the record names."""

    journal: Journal
    writer: RecordWriter
    folder: AnswerFolder | None = None
    keeps_partial: bool = True

    def finished(self, item: Item, answer: ItemAnswer) -> None:
        record = self.writer.finished(item, answer)
        if self.folder is not None:
            record["file"] = self.folder.put(item, answer.text)
        self.journal.put(record)

    def failed(self, item: Item, error: Exception) -> None:
        record = self.writer.failed(item, error)
        self.journal.put(record if self.folder is None else {**record, "file": None})


@dataclass
class AnswerFolder:
    """One text file for each item, named after its id. Names never lead out of the folder and never collide."""

    path: Path
    names: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(path: Path, ids: Iterable[str]) -> AnswerFolder:
        """The folder of a run, every name decided before the first file is written.

        `ids` are those of all items, also of earlier runs: a name that was one's own must not become another's.
        """
        names = {name: _file_name(name) for name in ids}
        while crowded := _crowded(names):
            names |= {name: _marked(names[name], name) for name in crowded}
        return AnswerFolder(path, names)

    @property
    def renamed(self) -> int:
        """How many texts lie in files that are not called as their ids."""
        return sum(file not in (name, f"{name}.txt") for name, file in self.names.items())

    def check_new(self) -> None:
        """Refuse to replace files that are not ours."""
        taken = next((file for name in self.names.values() if (file := self.path / name).exists()), None)
        if taken is not None:
            raise OutputFileExists(f"{taken} already exists.", hint="another --output-dir, or --overwrite.")

    def put(self, item: Item, text: str) -> str:
        """Write an item's text; returns the name of its file."""
        file = self.path / self.names[item.id]
        with on_disk(file, repr(item.id)):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, text + "\n")
        return self.names[item.id]


def _crowded(names: Mapping[str, str]) -> list[str]:
    """Whose files would be one file on some disk, or lie where another one needs a folder."""
    alike = {name: _as_disks_see(file) for name, file in names.items()}
    crowd = Counter(alike.values())
    folders = {str(folder) for file in alike.values() for folder in PurePosixPath(file).parents}
    return [name for name, file in alike.items() if crowd[file] > 1 or file in folders]


def _as_disks_see(file: str) -> str:
    """Some take A and a for the same, or an accented letter and its parts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", file).casefold())


def _file_name(name: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    kept = [_ending(re.sub(r"[^\w.\- ]", "-", part), LONGEST_NAME_B).lstrip(".") for part in parts]
    safe = "/".join(kept) if all(kept) else "item"
    if len(safe.encode()) > LONGEST_PATH_B:
        safe = kept[-1]
    return safe if Path(safe).suffix in TEXTS else f"{safe or 'item'}.txt"


def _ending(text: str, most_B: int) -> str:
    """The last so many bytes, whole characters only."""
    return text.encode()[-most_B:].decode(errors="ignore")


def _marked(file: str, name: str) -> str:
    """The same name with a few letters that no other id has."""
    path = Path(file)
    return str(path.with_name(f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:12]}{path.suffix}"))


@dataclass
class ScreenSink:
    """Standard output, in the order of the input: a result waits for those before it."""

    screen: Screen
    order: list[int]
    writer: RecordWriter
    as_json: bool
    keeps_partial: bool = False
    _thoughts_noted: bool = False
    _waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    _next: int = 0

    def finished(self, item: Item, answer: ItemAnswer) -> None:
        record = self.writer.finished(item, answer)
        self._tell_of_thoughts(answer)
        self._put(item, lambda: self._show(line_of(record).decode() if self.as_json else answer.shown))

    def failed(self, item: Item, error: Exception) -> None:
        record = self.writer.failed(item, error)
        self._put(item, lambda: self._show(line_of(record).decode() if self.as_json else ""))

    def flush(self) -> None:
        """Show what has been waiting for something that will not come."""
        for index in sorted(self._waiting):
            self._waiting.pop(index)()

    def _tell_of_thoughts(self, answer: ItemAnswer) -> None:
        if not (self.as_json or self._thoughts_noted) and any(choice.piece.reasoning for choice in answer.choices):
            self.screen.say("thoughts are left out here; --json or -o FILE keeps them")
            self._thoughts_noted = True

    def _put(self, item: Item, show: Callable[[], None]) -> None:
        self._waiting[item.index] = show
        while self._next < len(self.order) and self.order[self._next] in self._waiting:
            self._waiting.pop(self.order[self._next])()
            self._next += 1

    def _show(self, text: str) -> None:
        if text:
            self.screen.write(text)
            self.screen.end_line()
