"""Faults of disks for tests, put below the loop that checks reads: `os.preadv` itself goes wrong."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from threading import Event

import pytest
from transformers import PreTrainedModel

import offload
from offload.errors import OffloadError
from offload.stream.dequantized import DenseLayers
from offload.stream.slot import Slot, State
from offload.stream.stream import LayerStream
from specexec import Burst, SamplingParams
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from tests.waiting import until

Views = Sequence[memoryview]
Preadv = Callable[[int, Views, int], int]

FAULTS = ("EIO", "end of file", "exception")
EACH_FAULT = pytest.mark.parametrize("fault", FAULTS)


def reader_of(model: PreTrainedModel) -> LayerStream:
    """What reads its layers."""
    stream = offload.stream_of(model).stream
    stream = stream._stream if isinstance(stream, DenseLayers) else stream
    assert isinstance(stream, LayerStream)
    return stream


def read_ahead(model: PreTrainedModel) -> None:
    """Wait until the ring is full, so that nothing is read until the next sweep."""
    slots = reader_of(model)._slots
    until(lambda: not any(slot.reading or slot.state is State.EMPTY for slot in slots))


def fail_reads(monkeypatch: pytest.MonkeyPatch, fault: str, due: Callable[[], bool]) -> None:
    """Every read at whose beginning `due` says so fails."""
    real: Preadv = os.preadv

    def preadv(fd: int, views: Views, offset: int) -> int:
        if not due():
            return real(fd, views, offset)
        if fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "exception":
            raise ArithmeticError("a bug in the reader")
        return 0

    monkeypatch.setattr(os, "preadv", preadv)


def from_the(nth: int) -> Callable[[], bool]:
    """True from the nth time on."""
    calls = count(1)
    return lambda: next(calls) >= nth


@contextmanager
def reads_of_experts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Set for as long as experts are being read."""
    now, read_experts = Event(), LayerStream._read_experts

    def watched(self: LayerStream, slot: Slot, layer: int, wanted: frozenset[int]) -> None:
        now.set()
        read_experts(self, slot, layer, wanted)
        now.clear()

    with monkeypatch.context() as patched:
        patched.setattr(LayerStream, "_read_experts", watched)
        yield now


def slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read takes its time and brings only some of what it was asked for."""
    real: Preadv = os.preadv
    chance = random.Random(0)

    def preadv(fd: int, views: Views, offset: int) -> int:
        time.sleep(chance.random() / 200)
        return real(fd, [views[0][: chance.randint(1, views[0].nbytes)]], offset)

    monkeypatch.setattr(os, "preadv", preadv)


def is_reported(fault: str, said: str) -> bool:
    """Does an error name what went wrong: the exception, or file and layer?"""
    return "ArithmeticError" in said if fault == "exception" else ".safetensors at byte" in said and "(layer " in said


def read_on(bursts: Iterator[Burst], written: list[int]) -> None:
    """Everything that is still to come."""
    for burst in bursts:
        written += burst.tokens


def check_fails(fault: str, bursts: Iterator[Burst], written: list[int]) -> None:
    """The rest of an answer ends in an error that says what went wrong."""
    with pytest.raises(OffloadError) as failure:
        read_on(bursts, written)
    assert is_reported(fault, str(failure.value))


def check_goes_on(
    engine: Engine,
    asked: tuple[str, SamplingParams],
    written: list[int],
    caches: dict[object, KVCache],
    expected: tuple[int, ...],
) -> None:
    """What is written is a beginning of the answer, and its rest follows."""
    assert written == list(expected[: len(written)])
    assert len(written) < len(expected)
    read_on(engine.stream(*asked, caches, written), written)
    assert tuple(written) == expected
