"""Files that are replaced whole or not at all, whatever happens while they are written."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o600  # for its owner alone


@contextmanager
def replacing(path: Path, mode: int = 0o666, beside: Path | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, after its bytes have reached the disk.

    Until then it is called `beside`, or has a hidden name of its own; the umask takes its part of `mode`.
    """
    unfinished = beside or path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(unfinished, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_with(path: Path, content: bytes) -> None:
    """The file becomes these bytes, or stays what it was."""
    with replacing(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
