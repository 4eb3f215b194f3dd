"""Conversations on disk: one JSON-lines file each, under the XDG data directory, written whole or not at all.

The first line says what the file is, every other one is a message. Readable by their owner alone.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cli.errors import BadSession, SessionNotFound
from offload.places import folder_of
from offload.replacing import PRIVATE, replacing

FORMAT = 1
_ID = re.compile(r"[\w-]{1,80}")


@dataclass(frozen=True)
class Record:
    """One conversation as it is kept."""

    id: str
    model: str
    system: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    messages: tuple[dict[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The first thing that was asked, on one line."""
        asked = next((message["content"] for message in self.messages if message["role"] == "user"), "(empty)")
        return " ".join(asked.split())


def sessions_folder() -> Path:
    """Where conversations live; made, for its owner alone, when it is first asked for."""
    folder = folder_of("data") / "sessions"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class Archive:
    """All conversations of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, model: str) -> Record:
        """A conversation with an id of its own; nothing is written yet."""
        return Record(f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}", model)

    def save(self, record: Record) -> None:
        """Replace what is kept of a conversation, atomically."""
        head = {key: value for key, value in asdict(record).items() if key != "messages"}
        lines = [{"specexec_session": FORMAT, **head}, *record.messages]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with replacing(self._path(record.id), PRIVATE) as file:
            file.write(text.encode())

    def load(self, id: str) -> Record:
        """One conversation, by its id or by the beginning of it."""
        found = [path for path in self._paths() if path.stem == id] or [
            path for path in self._paths() if path.stem.startswith(id)
        ]
        if len(found) != 1 or not id:
            what = f"{len(found)} conversations begin with" if found else "there is no conversation"
            raise SessionNotFound(f"{what} {id!r}.", hint="specexec sessions list")
        return _read(found[0])

    def latest(self) -> Record:
        """The conversation that was saved last."""
        paths = self._paths()
        if not paths:
            raise SessionNotFound("there is no conversation to continue.", hint="specexec chat")
        return _read(max(paths, key=lambda path: path.stat().st_mtime_ns))

    def everything(self) -> Iterator[Record | BadSession]:
        """Every conversation, the latest first; a file that cannot be read comes as its error."""
        for path in sorted(self._paths(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                yield _read(path)
            except BadSession as problem:
                yield problem

    def remove(self, id: str) -> None:
        """Delete a conversation and its snapshot."""
        self._path(id).unlink()
        self.snapshot_path(id).unlink(missing_ok=True)

    def saved_s(self, id: str) -> float:
        """When it was saved, in seconds since the epoch."""
        return self._path(id).stat().st_mtime

    def snapshot_path(self, id: str) -> Path:
        """Where the keys and values of a conversation are kept, if they are."""
        return self._path(id).with_suffix(".safetensors")

    def _path(self, id: str) -> Path:
        assert _ID.fullmatch(id), "ids are made by us or were found as file names"
        return self.folder / f"{id}.jsonl"

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("*.jsonl") if _ID.fullmatch(path.stem)]


def _read(path: Path) -> Record:
    try:
        head, *messages = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if head.pop("specexec_session") != FORMAT:
            raise ValueError("made by another version of specexec")
        record = Record(**{**head, "id": path.stem})
        checked = tuple({"role": str(message["role"]), "content": str(message["content"])} for message in messages)
        return replace(record, messages=checked)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise BadSession(f"{path} is not a conversation of ours: {problem}.") from problem
