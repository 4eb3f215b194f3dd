"""The ring that keeps the wire busy: while one layer computes, a background thread reads the next ones.

Layers that travel are read in order, round and round, so that the first of the next sweep load while nobody waits for
them; layers that stay are handed out where they lie, and the ring reads on meanwhile. Each buffer carries the number of
its layer and is checked before use. Knows nothing of models, tokens or sweeps' meaning.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import torch

from offload.checkpoint import Block
from offload.errors import OffloadError, ReadFailed
from offload.scarce import refusal
from offload.store import Arena, Store
from offload.wire import HostWire, LinkLimit, Wire

# How long the compute thread sleeps before it looks whether the reader is still alive.
HEARTBEAT_s = 0.5


@dataclass(frozen=True)
class StreamStats:
    """What the stream has done so far: layers that computed and their bytes; `dropped_B` was read ahead in vain."""

    layers_read: int = 0
    bytes_read: int = 0
    dropped_B: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0


class Stream(Protocol):
    """Layers, one at a time and in any rhythm; what a wrapped layer needs."""

    @property
    def layers(self) -> int:
        """How many layers there are."""

    @property
    def position(self) -> int | None:
        """The layer that computes now."""

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep."""

    def stats(self) -> StreamStats:
        """What was done so far."""

    def take(self, layer: int) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, valid until `give` or the next `take`."""

    def give(self) -> None:
        """The layer has computed; its buffer may be filled again."""

    def unwaited(self) -> AbstractContextManager[None]:
        """While this is open nobody waits for a layer: whoever takes one that is not there yet gets ReadFailed."""

    def close(self) -> None:
        """Stop; nothing can be taken afterwards."""


class _State(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    TAKEN = "taken"


@dataclass
class _Slot:
    """One buffer of the ring and what it holds."""

    number: int
    host: Arena | None
    # One assignment moves a slot on, so that a Ctrl-C between two lines can lose none.
    state: _State = _State.FREE
    layer: int | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class LayerStream:
    """Layers over the wire, `ring` buffers ahead, except those that are `resident`; take them in order for full speed.

    One thread computes. Without a layer that travels nothing runs and nothing is waited for.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        store: Store,
        ring: Sequence[Arena | None],
        wire: Wire | None = None,
        limit_Bps: float | None = None,
        resident: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self._blocks = blocks
        self._resident = dict(resident or {})
        self._route = [layer for layer in range(len(blocks)) if layer not in self._resident]
        self._held: int | None = None  # the resident layer that computes
        self._store = store
        self._wire: Wire = wire or HostWire()
        self._changed = threading.Condition()
        self._slots = [_Slot(number, host) for number, host in enumerate(ring)]
        self._next = 0  # place in the route of what is read next
        self._course = 0  # counts restarts: what was read for an older course is dropped
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._hurried = False
        self._limit = LinkLimit(limit_Bps, sleep=self._closing.wait)
        self._stats = StreamStats()
        self._thread = threading.Thread(target=self._read_on, name="weights", daemon=True)
        if self._route:
            self._thread.start()

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._blocks)

    @property
    def position(self) -> int | None:
        """The layer that computes now."""
        return next((slot.layer for slot in self._in(_State.TAKEN)), self._held)

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep."""
        return sum(self._store.moved_B(layer) for layer in self._route)

    def stays(self, layer: int) -> bool:
        """Does the layer never travel, so that its tensors are good for as long as the stream is?"""
        return layer in self._resident

    def stats(self) -> StreamStats:
        """What was done so far."""
        return self._stats

    def take(self, layer: int) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, valid until `give` or the next `take`; a failed read is raised here."""
        started_s = time.monotonic()
        with self._changed:
            self._release()
            self._steer(layer)
            if layer in self._resident:
                self._held = layer
                self._count(layers_read=1)
                return self._resident[layer]
            while not self._in(_State.READY):
                self._check_reader()
                self._changed.wait(HEARTBEAT_s)
            slot = next((slot for slot in self._in(_State.READY) if slot.layer == layer), None)
            if slot is None:
                # The tag travels with the buffer: a stale one must never compute.
                held = [slot.layer for slot in self._in(_State.READY)]
                raise ReadFailed(f"buffers hold the layers {held}, layer {layer} was asked for.", "This is a bug.")
            slot.state = _State.TAKEN
            self._count(layers_read=1, bytes_read=self._store.moved_B(layer), wait_s=time.monotonic() - started_s)
        self._wire.receive(slot.number)
        return slot.tensors

    def give(self) -> None:
        """The layer has computed; its buffer may be filled again."""
        with self._changed:
            self._release()

    @contextmanager
    def unwaited(self) -> Iterator[None]:
        """Let go of whoever waits for a layer; what the reader is reading stays good for the next sweep."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._hurried = False

    def close(self) -> None:
        """Stop the reader and let go of the files; waits for the read in progress."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._wire.close()
        self._store.close()

    def _in(self, state: _State) -> list[_Slot]:
        return [slot for slot in self._slots if slot.state is state]

    def _release(self) -> None:
        self._held = None
        for slot in self._in(_State.TAKEN):
            self._wire.release(slot.number)
            slot.state = _State.FREE
            self._changed.notify_all()

    def _steer(self, layer: int) -> None:
        """Let the reader begin anew at `layer`, unless what is ready and what it reads next lead up to it."""
        if not self._route:
            return
        ready = self._in(_State.READY)
        turn = bisect_left(self._route, layer) % len(self._route)  # of `layer`, or of the next one that travels
        on_course = (self._next - turn - len(ready)) % len(self._route) == 0
        # Read-ahead that failed while nobody waited is tried again when its sweep begins; later layers just fail.
        if on_course and (self._failure is None or layer > 0):
            return
        for slot in ready:
            self._count(dropped_B=self._store.moved_B(slot.layer or 0))
            slot.state = _State.FREE
        self._restart(turn)

    def _restart(self, turn: int) -> None:
        self._next = turn
        self._course += 1
        self._failure = None
        self._changed.notify_all()

    def _check_reader(self) -> None:
        if self._closing.is_set():
            raise ReadFailed("the stream of layers was closed.", hint="load the model again.")
        if self._hurried:
            raise ReadFailed("the layer was not there yet, and nobody wanted to wait.")
        if not self._thread.is_alive():
            raise ReadFailed("the reader of weights has died.", hint="load the model again.")
        if failure := self._failure:
            self._restart(0)
            if isinstance(failure, OffloadError):
                raise failure
            hint = "close other programs, or give it less: --ram, --vram."
            if scarce := refusal(failure, "while the next layers were read", hint):
                raise scarce from failure
            raise ReadFailed(f"the reader of weights failed: {failure!r}.") from failure

    def _count(self, **more: float) -> None:
        now = self._stats
        self._stats = replace(now, **{name: getattr(now, name) + value for name, value in more.items()})

    def _read_on(self) -> None:
        """The reader: fill free buffers with the next layers until closed."""
        while True:
            with self._changed:
                while not self._closing.is_set() and (self._failure is not None or not self._in(_State.FREE)):
                    self._changed.wait()
                if self._closing.is_set():
                    return
                slot, turn, course = self._in(_State.FREE)[0], self._next, self._course
                layer = self._route[turn]
                slot.state = _State.FILLING
            try:
                failure, tensors = None, self._fill(slot, layer)
            except BaseException as error:  # handed to the compute thread, which raises it
                failure, tensors = error, {}
            with self._changed:
                if course != self._course or failure:
                    if course == self._course:
                        self._failure = failure
                    elif not failure:
                        self._count(dropped_B=self._store.moved_B(layer))
                    slot.state = _State.FREE
                else:
                    slot.layer, slot.tensors = layer, tensors
                    slot.state = _State.READY
                    self._next = (turn + 1) % len(self._route)
                self._changed.notify_all()

    def _fill(self, slot: _Slot, layer: int) -> Mapping[str, torch.Tensor]:
        block = self._blocks[layer]
        self._wire.ready_to_fill(slot.number)
        started_s = time.monotonic()
        host = self._store.read(layer, slot.host)
        self._limit.hold(self._store.moved_B(layer), started_s)
        with self._changed:
            self._count(read_s=time.monotonic() - started_s)
        return block.views(self._wire.send(slot.number, host))
