"""Prefetching: a ring of buffers that background threads fill with the next layers while one computes.

Layers that are streamed are read in order, cyclically, so that the first of the next sweep load between two sweeps;
resident layers are handed out where they lie, and the ring reads on meanwhile. Each buffer carries the number of
its layer and is checked before use. Knows nothing of models, tokens or sweeps' meaning.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from offload.checkpoint.block import Block
from offload.checkpoint.routing import DENSE, Routing, Visits
from offload.errors import OffloadError, ReadFailed
from offload.machine.out_of_memory import refusal
from offload.stream.protocol import StreamStats
from offload.stream.slot import Slot, State
from offload.stream.store import Arena, Store
from offload.stream.transfer import HostWire, LinkLimit, Wire

# How long the compute thread sleeps before it looks whether the readers are still alive.
HEARTBEAT_s = 0.5
# While the last blocks of one layer arrive the next one is asked for, or the disk would pause between them.
READERS = 2


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
        self._rows = 0  # of the sweep; none has been yet
        self._visits = Visits(next((block.routing for block in blocks if block.routing), DENSE))
        self._visited: set[int] = set()  # experts of the layer that computes
        self._likely: Mapping[int, Sequence[int]] = {}
        self._store = store
        self._wire: Wire = wire or HostWire()
        self._changed = threading.Condition()
        self._slots = [Slot(number, host) for number, host in enumerate(ring)]
        self._next = 0  # place in the route of what is read next
        self._closing = threading.Event()
        self._hurried = False
        self._limit = LinkLimit(limit_Bps, sleep=self._closing.wait)
        self._counts: dict[str, float] = asdict(StreamStats())
        readers = min(READERS, len(ring)) if self._route else 0
        self._readers = [threading.Thread(target=self._read_on, name="weights", daemon=True) for _ in range(readers)]
        for reader in self._readers:
            reader.start()

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._blocks)

    @property
    def position(self) -> int | None:
        """The layer that computes now."""
        return next((slot.layer for slot in self._in(State.TAKEN)), self._held)

    @property
    def bytes_per_sweep(self) -> int:
        """What comes over the wire in one sweep."""
        return sum(self._store.moved_B(layer, self._blocks[layer]) for layer in self._route)

    def share(self, rows: ArrayLike) -> NDArray[np.float64]:
        """The part of it that a sweep over so many rows is expected to bring: fewer rows visit fewer experts."""
        return 1 - self._experts_share * (1 - self.routing.share(rows))

    @property
    def routing(self) -> Routing:
        """Where its layers send rows to, as sweeps so far have shown."""
        return self._visits.routing

    @cached_property
    def _experts_share(self) -> float:
        mixed = [(layer, self._blocks[layer]) for layer in self._route if self._blocks[layer].routing]
        shared_B = sum(self._store.moved_B(layer, block.shared) for layer, block in mixed)
        return (sum(self._store.moved_B(*one) for one in mixed) - shared_B) / max(self.bytes_per_sweep, 1)

    def stays(self, layer: int) -> bool:
        """Does the layer never travel, so that its tensors are good for as long as the stream is?"""
        return layer in self._resident

    def stats(self) -> StreamStats:
        """What was done so far."""
        with self._changed:
            return StreamStats(**self._counts)  # type: ignore[arg-type]  # whole numbers stay whole

    def expect(self, likely: Mapping[int, Sequence[int]]) -> None:
        """These experts the sweep probably visits, by layer, the likeliest first: they come when nothing else does."""
        with self._changed:
            self._likely = likely
            self._changed.notify_all()

    def take(self, layer: int, rows: int | None = None) -> Mapping[str, torch.Tensor]:
        """The tensors of `layer`, but for so many rows' experts; valid until `give` or `take`; raises failed reads."""
        started_s = time.monotonic()
        with self._changed:
            self._release()
            self._rows = rows or self._rows
            self._steer(layer)
            if layer in self._resident:
                self._held = layer
                self._count(layers_read=1)
                return self._resident[layer]
            while (slot := next((slot for slot in self._in(State.READY) if slot.layer == layer), None)) is None:
                self._check_readers()
                self._check_course(layer)
                self._changed.wait(HEARTBEAT_s)
            if slot.failure is not None:
                self._fail(slot.failure)
            slot.state = State.TAKEN
            self._count(layers_read=1, bytes_read=slot.moved_B, wait_s=time.monotonic() - started_s)
        self._wire.receive(slot.number)
        if rows is None:
            self.fetch(slot.missing)
            self._visited.clear()  # no row has chosen
        return slot.tensors

    def fetch(self, experts: Collection[int]) -> None:
        """Bring these experts of the layer that computes, unless they are there; a failed read is raised here."""
        started_s = time.monotonic()
        with self._changed:
            slot = next(iter(self._in(State.TAKEN)), None)
            if slot is None:
                return  # the layer stays
            self._visited.update(experts)
            slot.wanted, slot.asked, slot.failure = slot.missing.intersection(experts), True, None
            slot.guessed = slot.guessed.difference(experts)
            self._changed.notify_all()
            while slot.wanted:
                self._check_readers()
                if slot.failure is not None:
                    self._fail(slot.failure)
                self._changed.wait(HEARTBEAT_s)
            self._count(wait_s=time.monotonic() - started_s)
        self._wire.receive(slot.number)

    def give(self) -> None:
        """The layer has computed; its buffer may be filled again."""
        with self._changed:
            self._release()

    @contextmanager
    def unwaited(self) -> Iterator[None]:
        """While this is open, `take` raises ReadFailed instead of waiting; what is being read serves the next sweep."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._hurried = False

    def close(self) -> None:
        """Stop the readers and let go of the files; waits for the reads in progress."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join()
        self._wire.close()
        self._store.close()

    def _in(self, state: State) -> list[Slot]:
        return [slot for slot in self._slots if slot.state is state]

    def _ahead(self) -> list[Slot]:
        """Buffers that hold, or will hold, a layer that was not taken yet."""
        return self._in(State.READY) + [slot for slot in self._in(State.EMPTY) if slot.layer is not None]

    def _release(self) -> None:
        self._held = None
        if self._visited:
            self._visits.learn(self._rows, len(self._visited))
            self._visited.clear()
        for slot in self._in(State.TAKEN):
            self._wire.release(slot.number)
            if slot.guessed and slot.layer is not None:
                self._count(wrong_B=self._store.moved_B(slot.layer, self._blocks[slot.layer].of(slot.guessed)))
            slot.wanted, slot.layer = frozenset(), None
            slot.state = State.EMPTY
            self._changed.notify_all()

    def _steer(self, layer: int) -> None:
        """Let the readers begin anew at `layer`, unless what is ready and what they read lead up to it."""
        if not self._route:
            return
        ahead = self._ahead()
        turn = bisect_left(self._route, layer) % len(self._route)  # of `layer`, or of the next one that travels
        on_course = (self._next - turn - len(ahead)) % len(self._route) == 0
        # Read-ahead that failed between sweeps is tried again when its sweep begins; later layers just fail.
        if not on_course or (layer == 0 and any(slot.failure for slot in ahead)):
            self._restart(turn)

    def _restart(self, turn: int) -> None:
        for slot in self._in(State.READY):
            self._count(dropped_B=slot.moved_B)
            slot.state = State.EMPTY
        for slot in self._in(State.EMPTY):
            slot.layer = None
        self._next = turn
        self._changed.notify_all()

    def _check_readers(self) -> None:
        if self._closing.is_set():
            raise ReadFailed("the stream of layers was closed.", hint="load the model again.")
        if self._hurried:
            raise ReadFailed("the layer was not there yet, and the caller did not want to wait.")
        if not all(reader.is_alive() for reader in self._readers):
            raise ReadFailed("the reader of weights has died.", hint="load the model again.")

    def _check_course(self, layer: int) -> None:
        """The tag travels with the buffer: a stale one must never compute, nor be waited for."""
        held = [slot.layer for slot in self._ahead()]
        if layer not in held and layer != self._route[self._next]:
            raise ReadFailed(f"buffers hold the layers {held}, layer {layer} was asked for.", "This is a bug.")

    def _fail(self, failure: BaseException) -> NoReturn:
        """What went wrong in a reader, raised in the thread that waits for the layer."""
        self._restart(0)
        if isinstance(failure, OffloadError):
            raise failure
        hint = "close other programs, or give it less: --ram, --vram."
        if scarce := refusal(failure, "while the next layers were read", hint):
            raise scarce from failure
        raise ReadFailed(f"the reader of weights failed: {failure!r}.") from failure

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._counts[name] += value

    def _read_on(self) -> None:
        """A reader: experts that a layer waits for, else the next layer into an empty buffer, else likely experts."""
        while not self._closing.is_set():
            with self._changed:
                idle = [slot for slot in self._slots if not slot.reading]
                asking = next((slot for slot in idle if slot.wanted and slot.failure is None), None)
                slot = asking or next((slot for slot in idle if slot.state is State.EMPTY), None)
                wanted = asking.wanted if asking else frozenset[int]()
                if slot is None:
                    slot, wanted = self._guessed(idle)
                if slot is None:
                    if not self._closing.is_set():
                        self._changed.wait()
                    continue
                if not wanted:
                    slot.layer, slot.failure = self._route[self._next], None
                    slot.guessed, slot.asked = frozenset(), False
                    self._next = (self._next + 1) % len(self._route)
                slot.reading, layer = True, slot.layer
            assert layer is not None
            if wanted:
                self._read_experts(slot, layer, wanted)
            else:
                self._read_layer(slot, layer)

    def _read_layer(self, slot: Slot, layer: int) -> None:
        block = self._blocks[layer]
        routing = self.routing if block.routing else DENSE
        sparse = self._rows > 0 and bool(routing.on_demand(self._rows))
        part = block.shared if sparse else block
        failure, tensors, moved_B = None, dict[str, torch.Tensor](), self._store.moved_B(layer, part)
        try:
            tensors = block.views(self._fill(slot, layer, part))
        except BaseException as error:  # handed to the compute thread, which raises it
            failure, moved_B = error, 0
        with self._changed:
            slot.reading = False
            if slot.layer is None:  # no longer wanted
                self._count(dropped_B=moved_B)
            else:
                slot.tensors, slot.failure, slot.moved_B = tensors, failure, moved_B
                slot.missing = frozenset(range(routing.experts)) if sparse else frozenset()
                slot.state = State.READY
            self._changed.notify_all()

    def _guessed(self, idle: Sequence[Slot]) -> tuple[Slot | None, frozenset[int]]:
        """An expert that is likely to be asked for, of the layer that computes or the next one that misses one.

        One at a time, and none while the computation waits for others: it would get its share of the wire.
        """
        if any(slot.wanted or (slot.reading and slot.state is not State.EMPTY) for slot in self._slots):
            return None, frozenset()
        ready = [slot for slot in idle if slot.state is not State.EMPTY and slot.missing and not slot.asked]
        first = self.position or 0
        for slot in sorted(ready, key=lambda slot: ((slot.layer or 0) - first) % len(self._blocks)):
            for expert in self._likely.get(slot.layer or 0, ()):
                if expert in slot.missing:
                    return slot, frozenset((expert,))
        return None, frozenset()

    def _read_experts(self, slot: Slot, layer: int, wanted: frozenset[int]) -> None:
        part, failure = self._blocks[layer].of(wanted), None
        moved_B = self._store.moved_B(layer, part)
        try:
            self._fill(slot, layer, part)
        except BaseException as error:
            failure = error
        with self._changed:
            slot.reading = False
            if slot.layer is None:  # no longer wanted
                self._count(dropped_B=moved_B)
            elif failure:  # of a guess it is raised when the expert is asked for
                slot.failure, slot.asked = failure if slot.wanted & wanted else slot.failure, True
            else:
                slot.guessed |= wanted - slot.wanted
                slot.missing, slot.wanted = slot.missing - wanted, slot.wanted - wanted
                slot.moved_B += moved_B
                if slot.state is State.TAKEN:
                    self._count(bytes_read=moved_B)
            self._changed.notify_all()

    def _fill(self, slot: Slot, layer: int, part: Block) -> torch.Tensor:
        self._wire.ready_to_fill(slot.number)
        started_s = time.monotonic()
        host = self._store.read(layer, slot.host, part)
        self._limit.hold(self._store.moved_B(layer, part), started_s)
        with self._changed:
            self._count(read_s=time.monotonic() - started_s)
        return self._wire.send(slot.number, host, part.spans)
