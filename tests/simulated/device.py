"""A device in Python: memory, streams, events and pinned RAM; torch runs on it through its dispatcher.

Every operation is issued to the stream that is current in its thread; what it reads and writes, in device memory and in
pinned RAM, is told to `clocks`. Tensors of the device hold a tensor of the CPU that computes at once. With `late`
copies land only when something that waits for them begins, and until then their targets hold nonsense. Memory that is
freed or handed out belongs to the stream it was allocated in, as torch's allocators have it. As on a real device,
tensors of the CPU cannot take part in an operation, and reading a value on the CPU waits for the stream.
"""

from __future__ import annotations

import math
import sys
import types
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from offload.machine import files, host_rows
from offload.model import load
from offload.stream import open as opening
from tests.simulated.clocks import Actor, Clock, History
from tests.simulated.threads import Threads

DEVICE = torch.device("privateuseone", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
RUNS = 64
"""A tensor of more separate runs of bytes counts as one run, holes included."""

ASKS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten.unique_consecutive.default, aten._unique2.default,
}  # fmt: skip
"""Operations whose result, or its shape, the host has to know."""


def _histogram(numbers: Tensor, *how: Any, **more: Any) -> Tensor:
    return torch.histc(numbers.float(), *how, **more).to(numbers.dtype)


def _dequantise(
    codes: Tensor, absmax: Tensor, block: int, kind: str, _: object, dtype: torch.dtype, out: Tensor
) -> None:
    # As rows of one block: bitsandbytes 0.50 reads wrong scales on the CPU where rows are no whole blocks.
    rows = [out.numel() // block, block]
    dense = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, kind, rows, dtype)
    out.copy_(dense.view(out.shape))


ON_CPU: dict[str, Callable[..., Any]] = {
    "aten.histc.default": _histogram,
    "bitsandbytes.dequantize_4bit.out": _dequantise,
}
"""Operations that devices have and the CPU has not, by what it has."""


class DeviceMemory:
    """One allocation: given back to its stream when the last tensor that looks into it is gone."""

    def __init__(self, simulator: Simulator, nbytes: int, label: str) -> None:
        self._simulator, self.nbytes, self._stream = simulator, nbytes, simulator.stream.actor
        simulator.held_B += nbytes
        simulator.most_B = max(simulator.most_B, simulator.held_B)
        self.history = History(f"device memory of {label}")
        # Kernels of this stream may still be using what lay here before.
        self.history.add(self._stream, [(0, nbytes)], True, "allocation")

    def __del__(self) -> None:
        self._simulator.held_B -= self.nbytes
        host = self._simulator.host
        if host is not None:
            self._simulator.races += [f"freed too early: {one}" for one in self.history.unfinished(self._stream, host)]


class DeviceTensor(Tensor):
    """A tensor of the simulated device: its numbers are in `held`, its place in `memory`."""

    held: Tensor
    memory: DeviceMemory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: DeviceMemory) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.held, made.memory = inner, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # Tensor declares it for instances
        cls, func: OpOverload, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        # Reached from a thread, or from inside an operation, where the mode is not on.
        return _running().run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch's own refuses tensors of other classes."""
        return self.cpu().tolist()


@dataclass(eq=False)
class Pending:
    """A copy that has not landed."""

    target: Tensor
    source: Tensor
    actor: Actor
    time: int
    clock: Clock


@dataclass
class _Shape:
    """What the schema of an operation says, once per operation."""

    name: str
    written: tuple[int, ...]
    written_names: frozenset[str]
    computes: bool


class SimulatedEvent:
    """As torch.Event."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.clock: Clock | None = None

    def record(self, stream: SimulatedStream | None = None) -> None:
        """What was issued to the stream so far."""
        simulator = self._simulator
        stream = stream or simulator.stream
        simulator.issue(stream)
        self.clock = stream.actor.tell()
        simulator.threads.maybe_switch()

    def synchronize(self) -> None:
        """Wait on the host."""
        if self.clock is not None:
            self._simulator.wait_on_host(self.clock)


class SimulatedStream:
    """As torch.Stream."""

    def __init__(self, simulator: Simulator, name: str) -> None:
        self._simulator = simulator
        self.actor = simulator.threads.actor(name)

    def wait_event(self, event: SimulatedEvent) -> None:
        """What is issued from now on waits for what the event recorded."""
        self._simulator.issue(self)
        if event.clock is not None:
            self.actor.hear(event.clock)
        self._simulator.threads.maybe_switch()

    def wait_stream(self, other: SimulatedStream) -> None:
        """What is issued from now on waits for what was issued to the other."""
        self._simulator.issue(self)
        self.actor.hear(other.actor.tell())
        self._simulator.threads.maybe_switch()

    def synchronize(self) -> None:
        """Wait on the host for all that was issued."""
        self._simulator.wait_on_host(self.actor.tell())


@dataclass(eq=False)
class Pinned:
    """A run of RAM that the device copies from by itself."""

    start: int
    stop: int
    history: History = field(default_factory=lambda: History("pinned RAM"))


class SimulatedAccelerator:
    """As offload's Accelerator."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.device = DEVICE

    def new_stream(self) -> SimulatedStream:
        """One more stream."""
        return SimulatedStream(self._simulator, "copies")

    def new_event(self) -> SimulatedEvent:
        """One more event."""
        return SimulatedEvent(self._simulator)

    @property
    def current(self) -> SimulatedStream:
        """That of the calling thread."""
        return self._simulator.stream

    @contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """The calling thread issues to this stream meanwhile."""
        turn, streams = self._simulator.threads.turn, self._simulator.streams
        before = streams.get(turn)
        streams[turn] = stream
        try:
            yield
        finally:
            streams[turn] = before or self._simulator.compute

    def pin(self, address: int, nbytes: int) -> int:
        """Copies of these bytes are asynchronous from now on."""
        insort(self._simulator.pinned, Pinned(address, address + nbytes), key=lambda one: one.start)
        return 0

    def unpin(self, address: int) -> None:
        """No copy may be on its way."""
        simulator = self._simulator
        (one,) = [pinned for pinned in simulator.pinned if pinned.start == address]
        simulator.pinned.remove(one)
        if (host := simulator.host) is not None:
            simulator.races += [f"unpinned too early: {late}" for late in one.history.unfinished(host)]


class Simulator:
    """One run of a program on the device: `with simulator:`, then look at `races`."""

    def __init__(self, seed: int = 0, late: bool = False, switches: float = 0.02) -> None:
        self.threads = Threads(seed, lambda: Dispatch(self))
        self.late, self._switches = late, switches
        self.compute = SimulatedStream(self, "compute")
        self.streams: dict[object, SimulatedStream] = {}
        self.pinned: list[Pinned] = []
        self.pending: list[Pending] = []
        self.races: list[str] = []
        self.held_B = self.most_B = 0
        """Device memory that is handed out now, and the most there was."""
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        """How often the host waited for the device, by what and where."""
        self._undo = ExitStack()

    def __enter__(self) -> Simulator:
        global _current
        assert _current is None, "one simulated device at a time"
        _register()
        _current = self
        self._undo.enter_context(patch.dict(sys.modules, {_module.__name__: _module}))
        self._undo.enter_context(patch.object(torch, "privateuseone", _module, create=True))
        self._undo.enter_context(self.threads.in_place())
        self._undo.enter_context(self.replacing())
        self._undo.enter_context(torch.no_grad())
        self._undo.enter_context(Dispatch(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _current
        try:
            if kind is None:
                self.threads.finish()
        finally:
            self._undo.close()
            _current = None

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Our code reaches this device where it would reach a real one."""

        def accelerator_of(device: torch.device) -> SimulatedAccelerator | None:
            return None if device.type == "cpu" else SimulatedAccelerator(self)

        read = files.Files.read

        def seen(reader: files.Files, ranges: Sequence[files.Range], label: str) -> None:
            for one in ranges:
                for view in one.views:
                    self.touch_host(self.host, files._address(view), [(0, view.nbytes)], True, f"reading {label}")
            self.threads.maybe_switch()
            read(reader, ranges, label)

        with ExitStack() as undo:
            for module in (host_rows, opening):
                undo.enter_context(patch.object(module, "accelerator_of", accelerator_of))
            undo.enter_context(patch.object(files.Files, "read", seen))
            undo.enter_context(patch.object(files, "ThreadPoolExecutor", _AtOnce))
            undo.enter_context(patch.object(load, "close_when_collected", lambda *_: None))
            yield

    @property
    def host(self) -> Actor | None:
        """The calling thread; None outside of the run."""
        return self.threads.turn.actor if self.threads.mine and _current is self else None

    @property
    def stream(self) -> SimulatedStream:
        """Where the calling thread issues to."""
        return self.streams.get(self.threads.turn) or self.compute

    def issue(self, stream: SimulatedStream) -> None:
        """The stream does something more, after all that the host did so far."""
        stream.actor.hear(self.threads.turn.actor.tell())
        stream.actor.tick()

    def wait_on_host(self, clock: Clock) -> None:
        """The calling thread hears what a stream has done."""
        self.threads.turn.actor.hear(clock)
        self.land(self.threads.turn.actor)
        self.threads.maybe_switch()

    def land(self, actor: Actor) -> None:
        """Copies that the actor waits for land now."""
        if not self.pending:
            return
        due: list[Pending] = []
        rest: list[Pending] = []
        for copy in self.pending:
            (due if actor.knows(copy.actor, copy.time) else rest).append(copy)
        self.pending = rest
        for copy in due:
            copy.target.copy_(copy.source)

    # --- operations

    def run(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
        """One operation of torch."""
        shape = _shape(func)
        read: list[Tensor] = []
        written: list[Tensor] = []
        for number, value in enumerate(args):
            _collect(value, written if number in shape.written else read)
        for name, value in kwargs.items():
            _collect(value, written if name in shape.written_names else read)
        wanted = kwargs.get("device")
        on_device = (wanted is not None and wanted.type == DEVICE.type) or any(
            isinstance(one, DeviceTensor) for one in (*read, *written)
        )
        if func in _COPIES:
            return _COPIES[func](self, args, kwargs)
        if not on_device:
            found = func(*args, **kwargs)
            if self.pinned and not _looks(found, read, written):
                self._touch_all(self.threads.turn.actor, read, written, shape.name)
            return found
        self._check_places(func, read, written)
        if self._switches:
            self.threads.maybe_switch(self._switches)
        stream = self.stream
        self.issue(stream)
        self.land(stream.actor)
        compute = ON_CPU.get(shape.name, func)
        found = compute(*map(_inner, args), **{name: _inner(value) for name, value in kwargs.items()})
        if func in ASKS or (func is aten.index.Tensor and _masks(args[1])):
            self.ask(shape.name)
        made = self._wrapped(found, read, written, shape.name)
        if shape.computes and not _looks(found, read, written):
            self.launches[shape.name] += 1
            self._touch_all(stream.actor, read, [*written, *_tensors(made, written)], shape.name)
        return made

    def ask(self, what: str) -> None:
        """The host waits for the current stream."""
        self.waits[f"{what} in {_place()}"] += 1
        self.wait_on_host(self.stream.actor.tell())

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Between host and device, or from one place of the device to another."""
        if self._switches:
            self.threads.maybe_switch(self._switches)
        stream, host = self.stream, self.threads.turn.actor
        self.issue(stream)
        self.land(stream.actor)
        self.launches["copy"] += 1
        both = isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor)
        outside = source if isinstance(target, DeviceTensor) else target
        queued = both or (non_blocking and self.range_of(outside) is not None)
        label = f"copy in {_place()}" if not queued else "copy"
        self._touch(stream.actor, source, False, label)
        self._touch(stream.actor, target, True, label)
        if self.late and queued and not both:
            into = target.held if isinstance(target, DeviceTensor) else target
            into.fill_(math.nan if into.dtype.is_floating_point else 255 if into.dtype == torch.uint8 else -1)
            self.pending.append(Pending(into, _inner(source), stream.actor, stream.actor.now, dict(stream.actor.clock)))
        else:
            _inner(target).copy_(_inner(source))
        if not queued:
            self.waits[label] += 1
            self.wait_on_host(stream.actor.tell())
        assert host is self.threads.turn.actor

    def new(self, inner: Tensor, label: str) -> DeviceTensor:
        """Memory of its own for a tensor of the CPU."""
        return DeviceTensor(inner, DeviceMemory(self, inner.untyped_storage().nbytes(), label))

    def _wrapped(self, found: Any, read: list[Tensor], written: list[Tensor], name: str) -> Any:
        if isinstance(found, (tuple, list)):
            return type(found)(self._wrapped(one, read, written, name) for one in found)
        if not isinstance(found, Tensor):
            return found
        for one in written:
            if isinstance(one, DeviceTensor) and one.held is found:
                return one
        place = found.untyped_storage()._cdata
        for one in (*read, *written):
            if isinstance(one, DeviceTensor) and one.held.untyped_storage()._cdata == place:
                return DeviceTensor(found, one.memory)
        return self.new(found, name)

    def _check_places(self, func: OpOverload, read: list[Tensor], written: list[Tensor]) -> None:
        for one in (*read, *written):
            if not isinstance(one, DeviceTensor) and (one.dim() or one in written):
                if func in (aten.index.Tensor, aten.index_put_.default) and one.dtype in (torch.int64, torch.bool):
                    self.waits[f"indices from RAM in {_place()}"] += 1
                    continue
                raise RuntimeError(f"{func} of tensors in RAM and on the device")

    # --- accesses

    def _touch_all(self, actor: Actor, read: Sequence[Tensor], written: Sequence[Tensor], label: str) -> None:
        for one in read:
            self._touch(actor, one, False, label)
        for one in written:
            self._touch(actor, one, True, label)

    def _touch(self, actor: Actor, tensor: Tensor, writes: bool, label: str) -> None:
        if not tensor.numel():
            return
        if isinstance(tensor, DeviceTensor):
            start = tensor.held.storage_offset() * tensor.held.itemsize
            runs = [(int(start + first), int(start + last)) for first, last in _runs(tensor.held)]
            self.races += tensor.memory.history.add(actor, runs, writes, label)
        elif self.pinned and tensor.device.type == "cpu":
            self.touch_host(actor, tensor.data_ptr(), _runs(tensor), writes, label)

    def touch_host(
        self, actor: Actor | None, address: int, runs: Sequence[tuple[int, int]], writes: bool, label: str
    ) -> None:
        """An access to RAM, of interest if it is pinned."""
        if actor is not None and (one := self._pinned_at(address)) is not None:
            base = address - one.start
            self.races += one.history.add(actor, [(base + first, base + last) for first, last in runs], writes, label)

    def range_of(self, tensor: Tensor) -> Pinned | None:
        """The pinned RAM that a tensor lies in."""
        return self._pinned_at(tensor.data_ptr()) if tensor.numel() else None

    def _pinned_at(self, address: int) -> Pinned | None:
        at = bisect_right(self.pinned, address, key=lambda one: one.start) - 1
        return self.pinned[at] if at >= 0 and address < self.pinned[at].stop else None


class Dispatch(TorchDispatchMode):
    """Shows the simulator every operation of a thread."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()
        self._simulator = simulator

    def __torch_dispatch__(self, func: OpOverload, _: object, args: Any = (), kwargs: Any = None) -> object:
        return self._simulator.run(func, args, kwargs or {})


class _AtOnce:
    """The pool of threads that read a file, without threads: they touch nothing of the device."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, job: Any, *args: object) -> Any:
        future: Future[object] = Future()
        try:
            future.set_result(job(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None: ...


_current: Simulator | None = None
_shapes: dict[OpOverload, _Shape] = {}


def _running() -> Simulator:
    assert _current is not None, "a tensor of the simulated device outlived its run"
    return _current


def _shape(func: OpOverload) -> _Shape:
    if (found := _shapes.get(func)) is None:
        arguments = func._schema.arguments
        written = [number for number, one in enumerate(arguments) if one.alias_info and one.alias_info.is_write]
        name = str(func)
        computes = not name.startswith(("aten.empty", "aten.new_empty"))
        names = frozenset(arguments[number].name for number in written)
        found = _shapes[func] = _Shape(name, tuple(written), names, computes)
    return found


def _collect(value: Any, into: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _collect(one, into)


def _tensors(value: Any, but: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    _collect(value, found)
    return [one for one in found if not any(one is other for other in but)]


def _inner(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, torch.device):
        return CPU if value.type == DEVICE.type else value
    if isinstance(value, (list, tuple)):
        return type(value)(_inner(one) for one in value)
    return value


def _looks(found: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Is the result but another look at the arguments' memory, so that nothing was computed?"""
    if written:
        return False
    results: list[Tensor] = []
    _collect(found, results)
    places = {_inner(one).untyped_storage()._cdata for one in read}
    return bool(results) and all(one.untyped_storage()._cdata in places for one in results)


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """Runs of bytes from the tensor's first item on."""
    size = tensor.itemsize
    if tensor.is_contiguous():
        return [(0, tensor.numel() * size)]
    starts, run = [0], size
    for length, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if length == 1 or stride == 0:
            continue
        if stride * size == run and len(starts) == 1:
            run *= length
        elif len(starts) * length <= RUNS:
            starts = [start + step * stride * size for step in range(length) for start in starts]
        else:
            run += (length - 1) * stride * size
    return [(start, start + run) for start in starts]


def _masks(indices: Sequence[Tensor | None]) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _place() -> str:
    """The innermost of our or transformers' functions that is running."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in ("offload", "specexec", "transformers"):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return "the test"


def _copy_(simulator: Simulator, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    target, source = args[0], args[1]
    if isinstance(target, DeviceTensor) or isinstance(source, DeviceTensor):
        simulator.copy(target, source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        target.copy_(source)
        simulator._touch_all(simulator.threads.turn.actor, [source], [target], "copy")
    return target


def _to_copy(simulator: Simulator, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    source, wanted = args[0], kwargs.get("device")
    here = isinstance(source, DeviceTensor)
    there = wanted.type == DEVICE.type if wanted is not None else here
    shaped = {name: kwargs[name] for name in ("dtype", "memory_format") if kwargs.get(name) is not None}
    if not here and not there:
        found: Tensor = aten._to_copy.default(*args, **kwargs)
        simulator._touch_all(simulator.threads.turn.actor, [source], [], "copy")
        return found
    target = torch.empty_like(_inner(source), **shaped)
    made = simulator.new(target, "copy") if there else target
    simulator.copy(made, source, kwargs.get("non_blocking", False))
    return made


_COPIES = {aten.copy_.default: _copy_, aten._to_copy.default: _to_copy}


# --- what torch needs to know of a device of this type, once per process


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


_registered: list[object] = []
_module = types.ModuleType("torch.privateuseone")
vars(_module).update(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0)
vars(_module).update(_is_in_bad_fork=lambda: False, manual_seed_all=lambda _: None)


def _register() -> None:
    if _registered:
        return
    guard = _Guard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Sequence[int], **how: Any) -> DeviceTensor:
        return _running().new(torch.empty(size, dtype=how.get("dtype")), "empty")

    def empty_strided(size: Sequence[int], stride: Sequence[int], **how: Any) -> DeviceTensor:
        return _running().new(torch.empty_strided(size, stride, dtype=how.get("dtype")), "empty_strided")

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        _running().copy(target, source, non_blocking)
        return target

    # torch.tensor(…, device=…) calls these past every mode.
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    _registered.extend([guard, library])
