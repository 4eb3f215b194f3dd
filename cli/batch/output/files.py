"""Small files that are replaced whole, never in part; and messages for what a disk refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.shared.errors import OutputDiskFull
from offload.machine.atomic_write import replace_with


@contextmanager
def on_disk(path: Path, what: str) -> Iterator[None]:
    """A failure to write inside the block becomes a refusal that says so and how to continue."""
    try:
        yield
    except OSError as problem:
        raise OutputDiskFull(
            f"{path}: {problem.strerror} while writing {what}.",
            why="Everything before it is complete and saved.",
            hint="make room, then the same command with --resume.",
        ) from problem


def replace_file(path: Path, content: str) -> None:
    """Put `content` at `path`, atomically and synced: readers and crashes see the old file or the new one."""
    replace_with(path, content.encode())
