"""Small files that are either the old one or the new one, never a part; and words for what a disk refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.errors import DiskFull


@contextmanager
def on_disk(path: Path, what: str) -> Iterator[None]:
    """A failure to write inside the block becomes a refusal that says so and how to go on."""
    try:
        yield
    except OSError as problem:
        raise DiskFull(
            f"{path}: {problem.strerror} while writing {what}.",
            why="Everything before it is complete and saved.",
            hint="make room, then the same command with --resume.",
        ) from problem


def replace_file(path: Path, content: str) -> None:
    """Put `content` at `path`, at once and for good: readers and crashes see the old file or the new one."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, where the system knows how."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
