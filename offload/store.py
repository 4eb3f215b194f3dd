"""Bytes of layers from disk or RAM, behind one `read`. Every read is complete and checked, or it is an error.

Plain `preadv` into page-aligned memory: a mapped file that shrinks kills the process, an unchecked short read is
silently wrong. Knows nothing of rings, threads or devices.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from offload.checkpoint import DTYPES, Block, Checkpoint, Copy
from offload.errors import ReadFailed
from offload.shards import SCRATCH_B, Entry

# Linux takes 1024 buffers a call; half of that is as fast and leaves room.
MAX_BUFFERS = 512


class Arena:
    """Page-aligned memory of an exact size, seen as bytes by reads and as a flat tensor by torch."""

    def __init__(self, size_B: int) -> None:
        # Anonymous maps come back zeroed, exactly as large as asked, and go back to the system when dropped.
        self._map = mmap.mmap(-1, max(size_B, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(self._map)
        self.flat = torch.frombuffer(self._map, dtype=torch.uint8)


class Store(Protocol):
    """Where layers come from."""

    @property
    def in_place(self) -> bool:
        """Does `read` hand out memory of the store's own, so that it needs no buffer?"""

    def read(self, layer: int, buffer: Arena | None) -> Arena:
        """The layer's bytes: `buffer` filled, or the store's own memory; complete or `ReadFailed`."""

    def moved_B(self, layer: int) -> int:
        """What one read of the layer brings over the wire."""

    def close(self) -> None:
        """Let go of files and memory."""


@dataclass
class _Open:
    fd: int
    size_B: int


class DiskStore:
    """Layers read from the checkpoint's own files, again at every visit."""

    in_place = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[Path, _Open] = {}
        self._scratch = Arena(checkpoint.scratch_B)

    def read(self, layer: int, buffer: Arena | None) -> Arena:
        """Fill `buffer` with the layer, converted to the compute dtype."""
        assert buffer is not None
        self.read_block(self._checkpoint.layers[layer], buffer)
        return buffer

    def read_block(self, block: Block, buffer: Arena) -> None:
        """Fill `buffer` with any block; after a failure the file is opened afresh, so that a repaired one is seen."""
        for run in _runs(block.copies):
            views = [buffer.bytes[copy.offset : copy.offset + copy.entry.nbytes] for copy in run]
            self._read_full(block, run[0].entry.file, run[0].entry.offset, views)
        for piece, part in block.conversions:
            self._convert(block, part.entry, piece.target(part, buffer.flat))

    def moved_B(self, layer: int) -> int:
        """The layer's bytes on disk."""
        return self._checkpoint.layers[layer].read_B

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1].fd)

    def _convert(self, block: Block, entry: Entry, target: torch.Tensor) -> None:
        """Read through the scratch memory, a slice of rows at a time."""
        for start, rows in entry.slices(SCRATCH_B):
            self._read_full(block, rows.file, rows.offset, [self._scratch.bytes[: rows.nbytes]])
            found = self._scratch.flat[: rows.nbytes].view(DTYPES[rows.dtype]).view(rows.shape)
            (target[start : start + rows.shape[0]] if rows.shape else target).copy_(found)

    def _read_full(self, block: Block, file: Path, offset: int, views: list[memoryview]) -> None:
        where = f"{file.name} at byte {offset} ({block.label})"
        try:
            fd = self._descriptor(file, where)
            if not read_exactly(fd, views, offset):
                raise ReadFailed(
                    f"could not read {where}: the file ends too early.",
                    "It was cut short while in use.",
                    "download the model again (only what is missing is fetched).",
                )
        except OSError as error:
            self._forget(file)
            raise ReadFailed(
                f"could not read {where}: {error.strerror} (errno {error.errno}).",
                "The disk, the file system or the network behind it failed.",
            ) from error
        except ReadFailed:
            self._forget(file)
            raise

    def _descriptor(self, file: Path, where: str) -> int:
        if file not in self._open:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._open[file] = _Open(fd, os.fstat(fd).st_size)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        expected = self._checkpoint.file_sizes[file]
        if self._open[file].size_B != expected:
            raise ReadFailed(
                f"could not read {where}: the file has {self._open[file].size_B} bytes, it had {expected} when loaded.",
                hint="load the model again if the file was replaced on purpose.",
            )
        return self._open[file].fd

    def _forget(self, file: Path) -> None:
        if file in self._open:
            os.close(self._open.pop(file).fd)


class RamStore:
    """Layers read once and kept in RAM; `read` copies nothing."""

    in_place = True

    def __init__(self, checkpoint: Checkpoint, disk: DiskStore) -> None:
        self._layers_B = [block.size_B for block in checkpoint.layers]
        self._layers: list[Arena] = []
        for block in checkpoint.layers:
            arena = Arena(block.size_B)
            disk.read_block(block, arena)
            self._layers.append(arena)

    @property
    def arenas(self) -> Sequence[Arena]:
        """The memory of every layer, for pinning."""
        return self._layers

    def read(self, layer: int, buffer: Arena | None) -> Arena:
        """The layer where it lies."""
        return self._layers[layer]

    def moved_B(self, layer: int) -> int:
        """The layer's bytes in memory."""
        return self._layers_B[layer]

    def close(self) -> None:
        """Drop the memory (views that are still in use keep their own part alive)."""
        self._layers = []


def read_exactly(fd: int, views: list[memoryview], offset: int) -> bool:
    """Fill all views from `offset` on, however short the single reads are; False if the file ends before."""
    waiting = [view for view in views if view.nbytes]
    while waiting:
        got = os.preadv(fd, waiting[:MAX_BUFFERS], offset)
        if got == 0:
            return False
        offset += got
        filled = 0
        while filled < len(waiting) and got >= waiting[filled].nbytes:
            got -= waiting[filled].nbytes
            filled += 1
        waiting = waiting[filled:]
        if got:
            waiting[0] = waiting[0][got:]
    return True


def _runs(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Copies that follow each other in one file, so that one call reads them all."""
    runs: list[list[Copy]] = []
    for copy in copies:
        last = runs[-1][-1].entry if runs else None
        if last and last.file == copy.entry.file and last.offset + last.nbytes == copy.entry.offset:
            runs[-1].append(copy)
        else:
            runs.append([copy])
    return runs
