"""Is a file still the one that was read? By inode, size and times for this machine, by samples of it for any machine.

A write can be hidden from the time of the last write, which programs may set back, but not from that of the last change
of the inode. That one also moves with the file's names, owner and permissions, which change no byte.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

# Spread over a file, these distinguish two fine-tunes of one model without reading all of it.
SPOTS, SPOT_B = 64, 4096
MOST_HEADER_B = 1 << 26


@dataclass(frozen=True)
class Stamp:
    """What the system says of a file at one moment."""

    content: tuple[int, int, int, int]
    """Device, inode, size and the time of the last write."""
    changed_ns: int
    kept_by: tuple[int, int, int, int]
    """Names, permissions, owner and group."""

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """From what `stat` says."""
        content = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return cls(content, status.st_ctime_ns, (status.st_nlink, status.st_mode, status.st_uid, status.st_gid))

    def is_same(self, now: "Stamp", renamed: bool) -> bool:
        """Whether nothing was written to it since, if files of its folder may have been `renamed` or not."""
        if self.content != now.content or self.changed_ns == now.changed_ns:
            return self.content == now.content
        return renamed or self.kept_by != now.kept_by


def names_stamp(file: Path) -> int:
    """Changes with every name that comes, goes or moves in the folder where a file really lies."""
    return file.resolve().parent.stat().st_mtime_ns


def stamps(files: list[Path]) -> dict[str, list[int]]:
    """For a record on this machine: each file's inode, size, and times of the last write and change."""
    found = {}
    for file in files:
        stamp = Stamp.of(file.stat())
        found[file.name] = [*stamp.content[1:], stamp.changed_ns]
    return found


def samples(file: Path) -> bytes:
    """A digest of a safetensors file's header and of spots all over it, the same on every machine."""
    seen, size_B = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as opened:
        header_B = int.from_bytes(opened.read(8), "little")
        seen.update(opened.read(min(header_B, MOST_HEADER_B)))
        for spot in range(SPOTS):
            opened.seek(max(0, size_B - SPOT_B) * spot // (SPOTS - 1))
            seen.update(opened.read(SPOT_B))
    return seen.digest()
