"""Bytes of layers from disk or RAM, behind one `read`. Every read is complete and checked, or it is an error.

Several threads may read at once. Knows nothing of rings or devices.
"""

import mmap
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Protocol

import torch

from offload.checkpoint.block import Block, Copy
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import SCRATCH_B
from offload.checkpoint.layout import Checkpoint
from offload.checkpoint.tensors import ALIGN_B, DTYPES
from offload.machine.files import LARGE_B, PAGE_B, SAFE, Files, Range, Reading


class Arena:
    """Page-aligned memory of an exact size, seen as bytes by reads and as a flat tensor by torch."""

    def __init__(self, size_B: int) -> None:
        # Anonymous maps come back zeroed, exactly as large as asked, and go back to the system when dropped. Most
        # systems give no huge pages to shared ones, Python's own choice.
        try:
            self._map = mmap.mmap(-1, max(size_B, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size_B} bytes for weights") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(self._map)
        self.flat = torch.frombuffer(self._map, dtype=torch.uint8)


class Store(Protocol):
    """Where layers come from."""

    def read(self, layer: int, buffer: Arena | None, part: Block) -> torch.Tensor:
        """The layer inside `buffer` or in the store's own memory, its `part` filled; complete or `ReadFailed`."""

    def moved_B(self, layer: int, part: Block) -> int:
        """What one read of this part of the layer, or of all of it, brings over the wire."""

    def close(self) -> None:
        """Let go of files and memory."""


class DiskStore:
    """Layers read from the checkpoint's own files, again at every visit."""

    def __init__(self, checkpoint: Checkpoint, reading: Reading = SAFE) -> None:
        self._checkpoint = checkpoint
        self._files = Files(checkpoint.file_sizes, reading)
        self._scratch = Arena(checkpoint.scratch_B + PAGE_B)
        self._converting = Lock()  # one scratch memory for all readers

    def read(self, layer: int, buffer: Arena | None, part: Block) -> torch.Tensor:
        """The layer inside a buffer of its size or more, its `part` filled and converted to the compute dtype."""
        assert buffer is not None
        self.read_block(part, buffer)
        return buffer.flat[: self._checkpoint.layers[layer].size_B]

    def read_block(self, block: Block, buffer: Arena) -> None:
        """Fill `buffer` with any block."""
        if ranges := _ranges(block.copies, buffer.bytes):
            self._files.read(ranges, block.label)
        with self._converting:
            for piece, part in block.conversions:
                self._convert(block, part.entry, piece.target(part, buffer.flat))

    def moved_B(self, layer: int, part: Block) -> int:
        """The part's bytes on disk."""
        return part.read_B

    def close(self) -> None:
        """Close every file and let go of the memory for reading."""
        self._files.close()
        self._scratch = Arena(0)

    def _convert(self, block: Block, entry: Entry, target: torch.Tensor) -> None:
        """Read through the scratch memory, a slice of rows at a time."""
        for start, rows in entry.slices(SCRATCH_B):
            lead = rows.offset % PAGE_B if rows.offset % ALIGN_B == 0 else 0
            where = slice(lead, lead + rows.nbytes)
            self._files.read([Range(rows.file, rows.offset, (self._scratch.bytes[where],))], block.label)
            found = self._scratch.flat[where].view(DTYPES[rows.dtype]).view(rows.shape)
            (target[start : start + rows.shape[0]] if rows.shape else target).copy_(found)


class TieredStore:
    """Some layers kept in RAM, read once and copied never; the others from disk at every visit."""

    def __init__(self, checkpoint: Checkpoint, disk: DiskStore, kept: Mapping[int, Arena]) -> None:
        self._layers = checkpoint.layers
        self._disk = disk
        self._kept = dict(kept)

    def read(self, layer: int, buffer: Arena | None, part: Block) -> torch.Tensor:
        """The layer where it lies, or its part from disk into `buffer`."""
        if layer in self._kept:
            return self._kept[layer].flat
        return self._disk.read(layer, buffer, part)

    def moved_B(self, layer: int, part: Block) -> int:
        """The part's bytes in memory, or on disk."""
        if layer not in self._kept:
            return self._disk.moved_B(layer, part)
        return part.size_B if part is self._layers[layer] else sum(stop - start for start, stop in part.spans)

    def close(self) -> None:
        """Close the files, drop the memory (views that are still in use keep their own part alive)."""
        self._disk.close()
        self._kept = {}


def _ranges(copies: Sequence[Copy], memory: memoryview) -> list[Range]:
    """Copies that follow each other in one file become one range where they do so in memory, or are small."""
    spans: list[tuple[Copy, list[list[int]]]] = []  # first copy, [start, end] in memory of each view
    end, small = None, False
    for copy in copies:
        start, stop = copy.offset, copy.offset + copy.entry.nbytes
        follows, was_small, small = end == (copy.entry.file, copy.entry.offset), small, copy.entry.nbytes < LARGE_B
        if follows and spans[-1][1][-1][1] == start:
            spans[-1][1][-1][1] = stop
        elif follows and small and was_small:
            spans[-1][1].append([start, stop])
        else:
            spans.append((copy, [[start, stop]]))
        end = (copy.entry.file, copy.entry.offset + copy.entry.nbytes)
    return [
        Range(first.entry.file, first.entry.offset, tuple(memory[start:stop] for start, stop in places))
        for first, places in spans
    ]
