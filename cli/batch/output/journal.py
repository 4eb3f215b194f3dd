"""The file of results: one line per item, on disk before the next one, whole lines only, one writer only.

A crash can tear the last line; opening the file again takes the torn part off, and the item is simply not done yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from cli.batch.input.items import Item
from cli.batch.output.files import on_disk, replace_file
from cli.batch.output.formats import Done, Record, done_of, line_of
from cli.batch.output.manifest import Manifest, check_same, read_manifest
from cli.batch.refusals import DamagedOutput, Locked, ManifestMismatch, OutputRefused
from cli.shared.errors import DISK_FULL, OutputFileExists
from offload.machine.atomic_write import sync_folder

RECORDS = "records.jsonl"  # of a run that writes each text into a file of its own


@dataclass(frozen=True)
class Beside:
    """Where the other files of a run lie."""

    output: Path

    @property
    def manifest(self) -> Path:
        return self.output.with_name(f"{self.output.name}.manifest.json")

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial.json")

    @property
    def lock(self) -> Path:
        return self.output.with_name(f".{self.output.name}.lock")


@dataclass
class Journal:
    """An open result file. `done` are the records it held when it was opened, by id."""

    path: Path
    manifest: Manifest
    lock: FileLock
    done: Mapping[str, Done] = field(default_factory=dict)
    torn_B: int = 0

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)
        self.lock.release()

    def check_prompts(self, items: Iterable[Item]) -> None:
        """Refuse an input that has changed under the same ids: the old answers would belong to other questions."""
        changed = [
            item.id for item in items if item.id in self.done and self.done[item.id].prompt_sha != item.prompt_sha
        ]
        if changed:
            mended = all(self.done[name].failed for name in changed)
            raise ManifestMismatch(
                f"{self.path} holds answers to other prompts; changed since: {len(changed)}, first {changed[0]!r}.",
                hint="--retry-failed, since all of them had failed." if mended
                else "the old input, another -o, or --overwrite.",
            )  # fmt: skip

    def put(self, record: Record) -> None:
        """Append one line and wait until the disk has it; a line that does not fit is taken back."""
        line = line_of(record)
        start = os.fstat(self._file).st_size
        with on_disk(self.path, repr(record["id"])):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, start)
                raise


def open_journal(
    path: Path, manifest: Manifest, *, resume: bool = False, overwrite: bool = False, retry_failed: bool = False
) -> Journal:
    """Take hold of a result file: a new one, or with `resume` the one of an earlier run of the same configuration.

    `retry_failed` forgets its error records first. Its folder is made if need be, and nothing else is changed before
    everything has been checked.
    """
    beside = Beside(path)
    if path.exists() and not path.is_file():
        raise OutputFileExists(f"{path} is not a file that results could be added to.", hint="another -o.")
    lock = _locked(path, beside)
    try:
        size_B = path.stat().st_size if path.exists() else 0
        if size_B and not (resume or overwrite):
            raise OutputFileExists(
                f"{path} already exists ({sum(1 for _ in _lines(path))} lines).",
                hint="--resume to continue it, --overwrite to start again, or another -o.",
            )
        done: dict[str, Done] = {}
        torn_B = 0
        then = read_manifest(beside.manifest) if path.exists() else None
        if resume and (size_B or then):
            check_same(path, then, manifest)
            torn_B = _cut_torn_tail(path)
            done = _read(path)
            if retry_failed and any(one.failed for one in done.values()):
                done = {name: one for name, one in done.items() if not one.failed}
                _rewrite(path, done)
        else:
            path.write_bytes(b"")
            beside.partial.unlink(missing_ok=True)
        with on_disk(beside.manifest, "the manifest"):
            manifest.save(beside.manifest)
            sync_folder(path.parent)
        return Journal(path, manifest, lock, done, torn_B)
    except BaseException:
        lock.release()
        raise


def _locked(path: Path, beside: Beside) -> FileLock:
    lock = FileLock(beside.lock, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        writer = read_manifest(beside.manifest)
        who = f" (pid {writer.pid}, started {writer.started})" if writer else ""
        raise Locked(f"another specexec{who} is writing {path}.", hint="another -o, or wait for it.") from None
    except OSError as problem:
        if problem.errno in DISK_FULL:
            raise
        # The user knows nothing of the lock; a folder that cannot be made is named.
        where = "" if problem.filename in (None, str(beside.lock)) else f"{problem.filename}: "
        raise OutputRefused(
            f"{path} cannot be written: {where}{problem.strerror}.",
            hint="another -o or --output-dir, where you may write.",
        ) from problem
    return lock


def _cut_torn_tail(path: Path) -> int:
    """Take off what follows the last whole record; returns how many bytes that was."""
    end = good = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            if line.endswith(b"\n") and done_of(line) is not None:
                good = end
    if good < end:
        _check_only_tail(path, good)
        os.truncate(path, good)
    return end - good


def _check_only_tail(path: Path, good: int) -> None:
    """A crash leaves at most one line or a run of zeros at the end; anything else is not for us to delete."""
    with path.open("rb") as file:
        file.seek(good)
        tail = file.read().strip(b"\0")
    if tail.count(b"\n") > 1 or (tail.endswith(b"\n") and tail.strip()):
        raise DamagedOutput(
            f"{path} ends in {len(tail)} bytes that are not results.", hint="look at it, or another -o."
        )


def _read(path: Path) -> dict[str, Done]:
    """All records by id; a line that is none is not for us to delete."""
    done: dict[str, Done] = {}
    for number, line in enumerate(_lines(path), start=1):
        one = done_of(line)
        if one is None:
            raise DamagedOutput(f"{path}:{number} is not a result.", hint="take that line out, or another -o.")
        done[one.id] = one
    return done


def _rewrite(path: Path, keep: Mapping[str, Done]) -> None:
    lines = [line for line in _lines(path) if (one := done_of(line)) is not None and one.id in keep]
    with on_disk(path, "the results without the failed ones"):
        replace_file(path, b"".join(lines).decode())


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file
