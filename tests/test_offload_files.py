"""Direct reads bring the right bytes for every alignment, and plain ones take over where the file system refuses."""

import errno
import os
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import ReadFailed
from offload.machine.files import BOUNCE_B, PAGE_B, Files, Range, Reading
from offload.stream.store import Arena
from tests.held import open_below, started_since

SIZE_B = 300_001
CONTENT = random.Random(0).randbytes(SIZE_B)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "weights"
    path.write_bytes(CONTENT)
    return path


readings = st.builds(
    Reading, block_B=st.sampled_from([1, PAGE_B, 3 * PAGE_B, 1 << 20]), threads=st.integers(1, 3), direct=st.booleans()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(readings, st.data())
def test_every_range_arrives_whole_whatever_its_alignment(file: Path, reading: Reading, data: st.DataObject) -> None:
    arena = Arena(SIZE_B + 2 * PAGE_B)
    offset = data.draw(st.integers(0, SIZE_B - 1))
    nbytes = data.draw(st.integers(1, SIZE_B - offset))
    start = data.draw(st.sampled_from([0, offset % PAGE_B, 64, 7]))
    cuts = sorted(data.draw(st.lists(st.integers(0, nbytes), max_size=3)))
    ends = [0, *cuts, nbytes]
    # The views lie apart by one byte each: order is kept, neighbours are not.
    views = [arena.bytes[start + a + i : start + b + i] for i, (a, b) in enumerate(pairwise(ends))]
    with patch(
        "offload.machine.files.BOUNCE_B", data.draw(st.sampled_from([PAGE_B, BOUNCE_B]))
    ):  # less than a block, or more
        files = Files({file: SIZE_B}, reading)
        files.read([Range(file, offset, tuple(views))], "layer 0")
    assert b"".join(bytes(view) for view in views) == CONTENT[offset : offset + nbytes]
    assert not any(arena.bytes[start + nbytes + len(views) :]), "nothing is written behind the views"
    assert not any(arena.bytes[:start])
    files.close()


def refusing(monkeypatch: pytest.MonkeyPatch, calls: Sequence[str]) -> None:
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def opened(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and "open" in calls:
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def read(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if fd in direct and "read" in calls:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, views, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.parametrize("call", ["open", "read"])
def test_a_file_system_that_refuses_is_read_plainly_and_said_once(
    call: str, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(monkeypatch, [call])
    files = Files({file: SIZE_B}, Reading(PAGE_B, 2))
    for _ in range(3):
        arena = Arena(SIZE_B)
        files.read([Range(file, 0, (arena.bytes,))], "layer 0")
        assert bytes(arena.bytes) == CONTENT
    files.close()
    assert caplog.text.count("refuses direct reads") == 1


def cached_pages(file: Path) -> int:
    """Pages of the file in the page cache, by the kernel's own count."""
    import ctypes
    import mmap

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as held:
        pages = -(-len(held) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(
            None, ctypes.c_size_t(len(held)), mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), ctypes.c_size_t(0)
        )
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(held)), found) == 0
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(held)))
    return sum(page & 1 for page in found)


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_is_left_alone(direct: bool, file: Path, tmp_path: Path) -> None:
    own = tmp_path / "weights"
    own.write_bytes(CONTENT)
    with own.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(own):
        pytest.skip("this file system keeps its files in memory")
    files = Files({own: SIZE_B}, Reading(1 << 16, 2, direct))
    arena = Arena(SIZE_B)
    files.read([Range(own, 0, (arena.bytes,))], "layer 0")
    files.close()
    assert cached_pages(own) <= 2


def test_input_output_errors_are_not_taken_for_a_refusal(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, views: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    files = Files({file: SIZE_B}, Reading(PAGE_B, 3))
    with pytest.raises(ReadFailed, match=r"could not read weights at byte 5 \(layer 7\).*errno 5"):
        files.read([Range(file, 5, (Arena(200_000).bytes,))], "layer 7")
    assert not files._open, "opened again next time"
    files.close()


def test_a_failure_takes_no_file_from_a_read_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was closed might give its number to another one, whose bytes would pass for weights."""
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    real, begun, failed = os.preadv, Event(), Event()

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset == 0:
            begun.set()
            assert failed.wait(60)
        elif offset == 2 * PAGE_B:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    files, arena = Files({file: SIZE_B}, Reading(PAGE_B, 2)), Arena(PAGE_B)
    slow = Thread(target=lambda: files.read([Range(file, 0, (arena.bytes,))], "layer 0"))
    slow.start()
    assert begun.wait(60)
    with pytest.raises(ReadFailed, match="errno 5"):
        files.read([Range(file, 2 * PAGE_B, (Arena(PAGE_B).bytes,))], "layer 1")
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]  # which ends at once: the read would find nothing
    failed.set()
    slow.join(60)
    assert bytes(arena.bytes) == CONTENT[:PAGE_B]
    files.read([Range(file, 3 * PAGE_B, (arena.bytes,))], "layer 2")
    assert len(open_below(file)) <= 2, "what was put aside is closed by now"
    for fd in taken:
        os.close(fd)
    files.close()


def test_no_thread_and_no_file_is_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    before = {*enumerate_threads()}
    for _ in range(30):
        files = Files({file: SIZE_B}, Reading(PAGE_B, 3))
        files.read([Range(file, 0, (Arena(SIZE_B).bytes,))], "layer 0")
        files.close()
    assert open_below(file) == []
    assert started_since(before) == set()


def test_a_read_after_the_end_is_an_error_and_never_waits(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(range(256)) * 64)
    files = Files({file: 16384}, Reading(threads=1))
    view = memoryview(bytearray(100))
    files.read([Range(file, 7, (view,))], "layer 3")
    files.close()
    with pytest.raises(ReadFailed, match=r"layer 3 was asked for after its files were closed"):
        files.read([Range(file, 7, (view,))], "layer 3")
