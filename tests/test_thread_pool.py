"""Promises of the threads that share arithmetic: every piece once, the same bits, and no thread is left at work."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offload.machine.thread_pool import share


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_piece_is_done_once_by_threads_of_one_core_each() -> None:
    seen: list[tuple[int, int, int]] = []

    def work(piece: int) -> None:
        time.sleep(0.001)
        seen.append((piece, threading.get_ident(), torch.get_num_threads()))

    share(work, range(100))
    pieces, who, threads = zip(*seen, strict=True)
    assert sorted(pieces) == list(range(100))
    assert 1 < len(set(who)) <= 3
    assert threading.get_ident() not in who
    assert set(threads) == {1}


def test_torch_has_its_threads_afterwards_here_and_on_threads_to_come() -> None:
    share(id, range(10))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as new:
        assert new.submit(torch.get_num_threads).result() == 3


def test_one_thread_needs_no_pool() -> None:
    torch.set_num_threads(1)
    who: set[int] = set()
    share(lambda _: who.add(threading.get_ident()), range(10))
    assert who == {threading.get_ident()}


def test_an_error_is_raised_after_all_threads_have_stopped() -> None:
    at_work: set[int] = set()

    def work(piece: int) -> None:
        at_work.add(piece)
        if piece == 3:
            at_work.remove(piece)
            raise MemoryError("piece 3")
        time.sleep(0.01)
        at_work.remove(piece)

    with pytest.raises(MemoryError, match="piece 3"):
        share(work, range(20))
    assert not at_work
    share(at_work.add, range(2))  # and the pool goes on
    assert at_work == {0, 1}


def test_pieces_of_several_callers_do_not_mix() -> None:
    def sums(first: int) -> int:
        torch.set_num_threads(3)
        found: list[int] = []
        share(found.append, range(first, first + 200))
        return sum(found)

    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(sums, range(8))) == [sum(range(first, first + 200)) for first in range(8)]


def test_tensors_of_inference_mode_may_be_filled() -> None:
    with torch.inference_mode():
        filled = torch.zeros(64)
        share(lambda at: filled[at].fill_(at), range(64))
    assert torch.equal(filled, torch.arange(64.0))
