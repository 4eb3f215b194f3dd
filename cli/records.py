"""Results as lines of JSON: every finished answer is on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from cli.errors import REFUSALS, DiskFull, OutputExists
from cli.screen import Screen

if TYPE_CHECKING:
    from specexec.stats import Completion

Record = dict[str, object]


def finished(item_id: str, completion: Completion) -> Record:
    """The record of an answer."""
    return {
        "id": item_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "usage": {"prompt_tokens": completion.prompt_tokens, "completion_tokens": len(completion.tokens)},
        "sweeps": completion.sweeps,
        "tokens_per_sweep": round(completion.tokens_per_sweep, 3),
        "bytes_read": completion.bytes_read,
        "seconds": round(completion.seconds, 3),
        "error": None,
    }


def failed(item_id: str, error: Exception) -> Record:
    """The record of an item that could not be answered; the keys are those of an answer."""
    assert isinstance(error, REFUSALS)
    reason = {"code": error.code, "message": error.what, "hint": error.hint}
    empty = ("text", "finish_reason", "seed", "usage", "sweeps", "tokens_per_sweep", "bytes_read", "seconds")
    return {"id": item_id, **dict.fromkeys(empty), "error": reason}


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Results are never replaced unless that was asked for."""
    if path.exists() and not overwrite:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
        raise OutputExists(f"{path} already exists ({count} lines).", hint="--overwrite, or another -o.")


class Sink(Protocol):
    """Where records go."""

    def put(self, record: Record) -> None: ...


class RecordFile:
    """A JSONL file that holds whole lines only, whatever happens between two of them."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
        self._file = os.open(path, flags, 0o644)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def put(self, record: Record) -> None:
        """Append one line and wait until the disk has it; a line that does not fit is taken back."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as problem:
            os.ftruncate(self._file, start)
            raise DiskFull(
                f"{self._path}: {problem.strerror} while writing {record['id']!r}.",
                why="The results before it are complete.",
            ) from problem


class RecordStream:
    """The same lines on standard output."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def put(self, record: Record) -> None:
        self._screen.write(json.dumps(record, ensure_ascii=False) + "\n")


class TextStream:
    """Only the answers, on standard output, one after another."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def put(self, record: Record) -> None:
        if record["text"] is not None:
            self._screen.write(str(record["text"]))
            self._screen.end_line()
