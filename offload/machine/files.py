"""Ranges of files into memory: direct I/O where disk and alignment allow, complete and checked, or an error.

Direct reads leave the page cache alone and copy nothing: they go straight into place where memory and file offset agree
modulo a page, and through a small bounce buffer where they do not. Plain reads finish whatever direct ones left undone.
Plain `preadv`, never a map: a mapped file that shrinks kills the process. Knows nothing of layers or torch.
"""

import errno
import logging
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from offload.errors import ReadFailed
from offload.machine.file_identity import Stamp, names_stamp

log = logging.getLogger(__name__)

# Direct I/O wants offsets, lengths and addresses at multiples of the disk's block: 512 or 4096 bytes.
PAGE_B = 4096
LARGE_B = 256 << 10  # a copy of less is not worth avoiding
# What cannot be read into place passes through a buffer of this size: disks are as fast with larger ones, which the
# memory would have to hold beside the layers.
BOUNCE_B = 2 << 20
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Reading:
    """How a disk is read. `doctor` measures what is best for it; these are safe for any."""

    block_B: int = 8 << 20
    threads: int = 2
    direct: bool = True

    @property
    def pages_B(self) -> int:
        """The block in whole pages."""
        return max(self.block_B // PAGE_B, 1) * PAGE_B

    @property
    def bounce_B(self) -> int:
        """Bytes of a bounce buffer, of which every thread has one."""
        return min(self.pages_B, BOUNCE_B)

    @property
    def buffers_B(self) -> int:
        """Bytes of the bounce buffers."""
        return self.threads * self.bounce_B


SAFE = Reading()


@dataclass(frozen=True)
class Range:
    """Bytes of `file` from `offset` that belong into `views`, one after the other."""

    file: Path
    offset: int
    views: tuple[memoryview, ...]

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + sum(view.nbytes for view in self.views)


@dataclass
class _Open:
    fd: int
    direct_fd: int | None

    def close(self) -> None:
        os.close(self.fd)
        if self.direct_fd is not None:
            os.close(self.direct_fd)


@dataclass(frozen=True)
class _Chunk:
    """What one call reads; `place` is where the bytes belong if they can go there at once."""

    whole: Range
    start: int
    end: int
    place: memoryview | None
    fd: int
    direct_fd: int | None


class _TooShort(Exception):
    """The file ended."""


class _Replaced(Exception):
    """The file is not the one whose header was read, or was written to since."""


class Files:
    """Files of known sizes, opened when first read; after a failure opened again, so that a repaired one is seen.

    Several threads may read at once: what is longer than a block is read in the order in which it was asked for.
    """

    def __init__(self, sizes_B: Mapping[Path, int], reading: Reading) -> None:
        self._sizes_B = sizes_B
        self._reading = reading
        self._open: dict[Path, _Open] = {}
        self._stamps = {file: Stamp.of(file.stat()) for file in sizes_B if file.exists()}
        self._names = {file: names_stamp(file) for file in self._stamps}
        self._refused = False
        self._closed = False
        self._lock = RLock()  # of what is open, who reads, and whether direct reads were refused
        self._reads = 0
        self._gone: list[_Open] = []  # closed when no read is running: another file might get their descriptors
        self._bounces: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(reading.threads):
            # Untouched pages of a map cost nothing, so buffers that are never needed are free.
            self._bounces.put(memoryview(mmap.mmap(-1, reading.bounce_B)))
        self._pool = ThreadPoolExecutor(reading.threads, "disk")

    def read(self, ranges: Sequence[Range], label: str) -> None:
        """Fill the views of all ranges, several reads in flight; `label` says in errors what they are."""
        if self._closed:
            raise ReadFailed(f"{label} was asked for after its files were closed.", hint="load the model again.")
        with self._in_use():
            chunks = [chunk for whole in ranges for chunk in self._chunks_of(whole, label)]
            if len(chunks) == 1:
                with self._explained(chunks[0].whole, label):
                    self._read_chunk(chunks[0])
                return
            futures = [self._pool.submit(self._read_chunk, chunk) for chunk in chunks]
            wait(futures)  # all have ended before a file is closed or a buffer used again
            for chunk, future in zip(chunks, futures, strict=True):
                with self._explained(chunk.whole, label):
                    future.result()

    def close(self) -> None:
        """Close every file and end the threads."""
        self._pool.shutdown()
        with self._in_use():
            while self._open:
                self._forget(next(iter(self._open)))
        self._closed = True
        self._bounces = SimpleQueue()  # given back; who waited for one now would wait for ever

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """While a read is running no file is closed."""
        with self._lock:
            self._reads += 1
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1
                while self._gone and not self._reads:
                    self._gone.pop().close()

    @contextmanager
    def _explained(self, whole: Range, label: str) -> Iterator[None]:
        """Failures as errors that name the place; the file is opened again the next time."""
        where = f"{whole.file.name} at byte {whole.offset} ({label})"
        try:
            yield
        except _TooShort:
            self._forget(whole.file)
            raise ReadFailed(
                f"could not read {where}: the file ends too early.",
                "It was cut short while in use.",
                "download the model again (only what is missing is fetched).",
            ) from None
        except _Replaced as error:
            self._forget(whole.file, stamp=False)
            raise ReadFailed(
                f"could not read {where}: {error}.",
                "Old and new weights must not mix.",
                "load the model again if the file was replaced on purpose.",
            ) from None
        except OSError as error:
            self._forget(whole.file)
            raise ReadFailed(
                f"could not read {where}: {error.strerror} (errno {error.errno}).",
                "The disk, the file system or the network behind it failed.",
            ) from error

    def _chunks_of(self, whole: Range, label: str) -> list[_Chunk]:
        with self._explained(whole, label), self._lock:
            file = self._opened(whole.file)
        direct = file.direct_fd is not None and not self._refused
        return list((_direct_chunks if direct else _plain_chunks)(whole, self._reading, file))

    def _read_chunk(self, chunk: _Chunk) -> None:
        length_B = chunk.end - chunk.start
        if chunk.place is not None:
            self._fill(chunk, chunk.place, length_B)
            return
        bounce = self._bounces.get()
        try:
            # The last page of a file is rarely whole.
            self._fill(chunk, bounce[:length_B], min(chunk.end, chunk.whole.end) - chunk.start)
            _scatter(bounce, chunk)
        finally:
            self._bounces.put(bounce)

    def _fill(self, chunk: _Chunk, view: memoryview, wanted_B: int) -> None:
        """At least the first `wanted_B` bytes of the view; what a direct read leaves undone a plain one finishes."""
        got = 0
        if chunk.direct_fd is not None:
            try:
                got = os.preadv(chunk.direct_fd, [view], chunk.start)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                self._refuse()
        if got < wanted_B:
            if not read_exactly(chunk.fd, view[got:wanted_B], chunk.start + got):
                raise _TooShort
            # What is read once per sweep would only push out what others keep in the page cache.
            os.posix_fadvise(chunk.fd, chunk.start + got, wanted_B - got, os.POSIX_FADV_DONTNEED)

    def _opened(self, file: Path) -> _Open:
        if file not in self._open:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._open[file] = _Open(fd, None)
            if self._reading.direct and not self._refused:
                self._open[file].direct_fd = self._open_direct(file)
            direct = self._open[file].direct_fd is not None
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM if direct else os.POSIX_FADV_SEQUENTIAL)
        found = self._open[file]
        status = os.fstat(found.fd)
        if status.st_size != self._sizes_B[file]:
            self._stamps.pop(file, None)  # the repaired file may be another one
            raise _Replaced(f"the file has {status.st_size} bytes, it had {self._sizes_B[file]} when loaded")
        # An open file that is renamed or removed stays what it was.
        then, now = self._stamps.setdefault(file, Stamp.of(status)), Stamp.of(status)
        if then != now:
            names = names_stamp(file)
            if not then.is_same(now, renamed=names != self._names.get(file)):
                raise _Replaced("another file has taken its name, or it was written to")
            self._stamps[file], self._names[file] = now, names
        return found

    def _open_direct(self, file: Path) -> int | None:
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._refuse()
            return None

    def _refuse(self) -> None:
        with self._lock:
            if not self._refused:
                log.warning("the file system refuses direct reads: weights are read through the page cache")
            self._refused = True

    def _forget(self, file: Path, *, stamp: bool = True) -> None:
        with self._lock:
            if stamp:
                self._stamps.pop(file, None)
            if file in self._open:
                self._gone.append(self._open.pop(file))


def read_exactly(fd: int, view: memoryview, offset: int) -> bool:
    """Fill the view from `offset` on, however short the single reads are; False if the file ends before."""
    while view.nbytes:
        got = os.preadv(fd, [view], offset)
        if got == 0:
            return False
        view, offset = view[got:], offset + got
    return True


def _plain_chunks(whole: Range, reading: Reading, file: _Open) -> Iterator[_Chunk]:
    """Every view in pieces of at most a block."""
    at, block_B = whole.offset, reading.pages_B
    for view in whole.views:
        for start in range(0, view.nbytes, block_B):
            piece = view[start : start + block_B]
            yield _Chunk(whole, at + start, at + start + piece.nbytes, piece, file.fd, None)
        at += view.nbytes


def _direct_chunks(whole: Range, reading: Reading, file: _Open) -> Iterator[_Chunk]:
    """The range in pieces of at most a block, or a bounce buffer, that begin and end at pages."""

    def chunks(start: int, end: int, in_place: bool) -> Iterator[_Chunk]:
        block_B = reading.pages_B if in_place else reading.bounce_B
        for at in range(start, end, block_B):
            stop = min(at + block_B, end)
            place = whole.views[0][at - whole.offset : stop - whole.offset] if in_place else None
            yield _Chunk(whole, at, stop, place, file.fd, file.direct_fd)

    first, last = _up(whole.offset), whole.end // PAGE_B * PAGE_B
    if len(whole.views) == 1 and first < last and (_address(whole.views[0]) - whole.offset) % PAGE_B == 0:
        yield from chunks(first, last, in_place=True)
        yield from chunks(whole.offset // PAGE_B * PAGE_B, first, in_place=False)
        yield from chunks(last, _up(whole.end), in_place=False)
    else:
        yield from chunks(whole.offset // PAGE_B * PAGE_B, _up(whole.end), in_place=False)


def _scatter(bounce: memoryview, chunk: _Chunk) -> None:
    """What belongs to the range from the bounce buffer into its views."""
    source, at = _array(bounce), chunk.whole.offset
    for view in chunk.whole.views:
        start, end = max(at, chunk.start), min(at + view.nbytes, chunk.end)
        if start < end:
            # numpy copies without the interpreter's lock, so that another chunk can arrive meanwhile.
            np.copyto(_array(view)[start - at : end - at], source[start - chunk.start : end - chunk.start])
        at += view.nbytes


def _array(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8)


def _address(view: memoryview) -> int:
    return int(_array(view).ctypes.data)


def _up(nbytes: int) -> int:
    return -(-nbytes // PAGE_B) * PAGE_B
