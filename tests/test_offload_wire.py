"""The wire to a device pins what it must and no more; the order of its copies is in test_order_of_work.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from offload.errors import NotEnoughRam
from offload.machine.accelerator import Accelerator, accelerator_of
from offload.stream.store import Arena
from offload.stream.transfer import DeviceWire

Log = list[tuple[object, ...]]


class Quiet:
    """A stream or an event where nothing takes time."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def record(self, _: object) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None:
        self.log.append(("host", "waits"))


class StandIn(Accelerator):
    """A device whose memory is RAM; logs what is pinned, or refuses with a number."""

    def __init__(self, outcome: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.log: Log = []
        self.outcome = outcome
        self._quiet = Quiet(self.log)

    def new_stream(self) -> torch.Stream:
        return self._quiet  # type: ignore[return-value]  # as much of a stream as is asked of it

    def new_event(self) -> torch.Event:
        return self._quiet  # type: ignore[return-value]

    @property
    def current(self) -> torch.Stream:
        return self._quiet  # type: ignore[return-value]

    @contextmanager
    def on(self, stream: torch.Stream) -> Iterator[None]:
        yield

    def pin(self, address: int, nbytes: int) -> int:
        self.log.append(("pinned", address, nbytes))
        return self.outcome

    def unpin(self, address: int) -> None:
        self.log.append(("unpinned", address))


def test_bytes_are_copied_to_the_device() -> None:
    arena = Arena(256)
    arena.flat.fill_(7)
    wire = DeviceWire(StandIn(), 1, 256, [arena])
    device = wire.send(0, arena.flat, [(0, 256)])
    assert torch.equal(device, arena.flat)
    assert device.data_ptr() != arena.flat.data_ptr()


def test_memory_is_pinned_exactly_and_unpinned_after_the_last_copy() -> None:
    here, arenas = StandIn(), [Arena(1000), Arena(3000)]
    wire = DeviceWire(here, 2, 3000, arenas)
    wire.close()
    wire.close()
    assert [entry[2] for entry in here.log if entry[0] == "pinned"] == [1000, 3000]
    assert len([entry for entry in here.log if entry[0] == "unpinned"]) == 2
    assert here.log.index(("host", "waits")) < here.log.index(("unpinned", arenas[1].flat.data_ptr()))


def test_memory_that_cannot_be_pinned_is_a_refusal() -> None:
    here = StandIn(outcome=2)
    with pytest.raises(NotEnoughRam, match=r"could not pin 1\.0 KiB of RAM .*CUDA error 2"):
        DeviceWire(here, 1, 64, [Arena(1024)])
    assert [entry[0] for entry in here.log] == ["pinned"]


def test_a_refusal_to_pin_is_not_handed_to_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's runtime keeps the error of a call until somebody asks for it, and every launch of torch does."""

    class Runtime:
        kept = 0

        def cudaHostRegister(self, *_: int) -> int:
            self.kept = 2
            return 2

        def launch(self, *_: object, **__: object) -> None:
            kept, self.kept = self.kept, 0
            if kept:
                raise RuntimeError(f"CUDA error {kept}")

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", runtime.launch)
    assert Accelerator(torch.device("cuda", 0)).pin(1 << 12, 4096) == 2
    runtime.launch()


def test_a_device_of_another_maker_is_asked_through_torch_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert accelerator_of(torch.device("cpu")) is None
    other = accelerator_of(torch.device("xpu", 1))
    assert other is not None
    assert other.device == torch.device("xpu", 1)
    assert [other.pin(1 << 12, 4096), other.pin(1 << 13, 4096)] == [0, 0]
    other.unpin(1 << 12)
    assert caplog.text.count("cannot be pinned for copies to xpu") == 1
