"""The CUDA wire keeps both promises of order, checked on a stand-in for CUDA; on a GPU the same calls are real."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from offload.errors import NotEnoughRam
from offload.stream.store import Arena
from offload.stream.transfer import CudaWire

Log = list[tuple[object, ...]]


class Event:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.name = f"event {len([entry for entry in log if entry[0] == 'made'])}"
        log.append(("made", self.name))

    def record(self, stream: "Stream") -> None:
        self.log.append((stream.name, "records", self.name))

    def synchronize(self) -> None:
        self.log.append(("reader", "waits", self.name))


class Stream:
    def __init__(self, log: Log, name: str) -> None:
        self.log = log
        self.name = name

    def wait_event(self, event: Event) -> None:
        self.log.append((self.name, "waits", event.name))

    def synchronize(self) -> None:
        self.log.append(("host", "waits", self.name))


class Runtime:
    def __init__(self, log: Log, outcome: int) -> None:
        self.log = log
        self.outcome = outcome

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.log.append(("pinned", address, nbytes))
        return self.outcome

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append(("unpinned", address))
        return 0


def stand_in(monkeypatch: pytest.MonkeyPatch, outcome: int = 0) -> Log:
    log: Log = []
    compute = Stream(log, "compute")

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "copies"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(log, outcome))
    return log


def test_copies_wait_for_the_computation_and_the_computation_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(monkeypatch)
    arena = Arena(256)
    arena.flat.fill_(7)
    wire = CudaWire(torch.device("cpu"), 1, 256, [arena])
    log.clear()
    wire.ready_to_fill(0)
    device = wire.send(0, arena.flat, [(0, 256)])
    wire.receive(0)
    wire.release(0)
    wire.ready_to_fill(0)
    assert torch.equal(device, arena.flat)
    assert device.data_ptr() != arena.flat.data_ptr()
    landed, released = "event 0", "event 1"
    assert log == [
        ("reader", "waits", landed),
        ("copies", "waits", released),
        ("copies", "records", landed),
        ("compute", "waits", landed),
        ("compute", "records", released),
        ("reader", "waits", landed),
    ]


def test_memory_is_pinned_exactly_and_unpinned_after_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(monkeypatch)
    arenas = [Arena(1000), Arena(3000)]
    wire = CudaWire(torch.device("cpu"), 2, 3000, arenas)
    wire.close()
    wire.close()
    assert [entry[2] for entry in log if entry[0] == "pinned"] == [1000, 3000]
    assert len([entry for entry in log if entry[0] == "unpinned"]) == 2
    assert log.index(("host", "waits", "copies")) < log.index(("unpinned", arenas[1].flat.data_ptr()))


def test_memory_that_cannot_be_pinned_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(monkeypatch, outcome=2)
    with pytest.raises(NotEnoughRam, match=r"could not pin 1\.0 KiB of RAM .*CUDA error 2"):
        CudaWire(torch.device("cpu"), 1, 64, [Arena(1024)])
    assert [entry[0] for entry in log] == ["pinned"]
