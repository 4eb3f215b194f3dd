"""How a layer gets from host memory to where it computes, and how fast. Knows nothing of layers' contents.

On the CPU it is there already. To a device a copy stream carries it from pinned memory, with events both ways: the
copy waits until the computation has released the buffer, the computation waits until the copy has landed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Protocol

import torch

from offload.errors import NotEnoughRam
from offload.machine.accelerator import Accelerator
from offload.stream.store import Arena
from offload.units import size

log = logging.getLogger(__name__)

Spans = Sequence[tuple[int, int]]


class Wire(Protocol):
    """How a layer gets from host memory to where it computes."""

    def ready_to_fill(self, slot: int) -> None:
        """Wait (in a reader) until the host buffer of this slot has left."""

    def send(self, slot: int, host: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Start moving (in a reader) these runs of bytes; returns all of them where they will be."""

    def receive(self, slot: int) -> None:
        """Make the computation wait for the bytes."""

    def release(self, slot: int) -> None:
        """The computation that was issued so far is the last to use the slot."""

    def close(self) -> None:
        """Undo what was set up, once nothing moves any more."""


class HostWire:
    """Compute where the bytes are."""

    def ready_to_fill(self, slot: int) -> None:
        """Nothing leaves, nothing to wait for."""

    def send(self, slot: int, host: torch.Tensor, spans: Spans) -> torch.Tensor:
        """The bytes are there already."""
        return host

    def receive(self, slot: int) -> None:
        """The bytes are there already."""

    def release(self, slot: int) -> None:
        """Computation on the host is over when it returns."""

    def close(self) -> None:
        """Nothing was set up."""


class LinkLimit:
    """A slower wire: holds each layer back until `limit_Bps` would have carried it."""

    def __init__(
        self,
        limit_Bps: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._limit_Bps = limit_Bps
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0
        self._lock = Lock()  # readers share the wire

    def hold(self, nbytes: int, started_s: float) -> None:
        """Sleep until the wire, free since the last layer, could have carried `nbytes` that left at `started_s`."""
        if self._limit_Bps is None:
            return
        with self._lock:
            due_s = self._free_at = max(self._free_at, started_s) + nbytes / self._limit_Bps
        if (rest_s := due_s - self._clock()) > 0:
            self._sleep(rest_s)


class DeviceWire:
    """Copies over PCIe from pinned host memory into a ring on the device."""

    def __init__(
        self, accelerator: Accelerator, slots: int, slot_B: int, ring: Iterable[Arena], kept: Sequence[Arena] = ()
    ) -> None:
        self._accelerator = accelerator
        self._pinned: list[Arena] = []
        try:
            for arena in ring:
                self._pin(arena)
        except NotEnoughRam:
            self._unpin()
            raise
        for number, arena in enumerate(kept):
            try:
                self._pin(arena)
            except NotEnoughRam as refusal:
                # Copies from the rest are slower, and right: their reader waits for them instead of the copy stream.
                log.warning("only %d of %d layers in RAM are pinned: %s", number, len(kept), refusal.what)
                break
        try:
            device = accelerator.device
            self._ring = [torch.empty(slot_B, dtype=torch.uint8, device=device) for _ in range(slots)]
        except torch.OutOfMemoryError:
            self._unpin()
            raise
        self._copies = accelerator.new_stream()
        # The ring may lie where something lay that is still being computed with.
        self._copies.wait_stream(accelerator.current)
        self._landed = [accelerator.new_event() for _ in range(slots)]
        self._released = [accelerator.new_event() for _ in range(slots)]

    def ready_to_fill(self, slot: int) -> None:
        """Wait until the last copy out of this host buffer has landed (an event never recorded is over)."""
        self._landed[slot].synchronize()

    def send(self, slot: int, host: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Start the copy once the computation has released the device buffer."""
        with self._accelerator.on(self._copies):
            self._copies.wait_event(self._released[slot])
            for start, stop in spans:
                self._ring[slot][start:stop].copy_(host[start:stop], non_blocking=True)
            self._landed[slot].record(self._copies)
        return self._ring[slot]

    def receive(self, slot: int) -> None:
        """The computation that is issued from now on waits for the copy."""
        self._accelerator.current.wait_event(self._landed[slot])

    def release(self, slot: int) -> None:
        """The next copy into this slot waits for the computation that was issued so far."""
        self._released[slot].record(self._accelerator.current)

    def close(self) -> None:
        """Let copies land and unpin the memory."""
        self._copies.synchronize()
        self._unpin()

    def _unpin(self) -> None:
        while self._pinned:
            self._accelerator.unpin(self._pinned.pop().flat.data_ptr())

    def _pin(self, arena: Arena) -> None:
        nbytes = arena.flat.nbytes
        if (error := self._accelerator.pin(arena.flat.data_ptr(), nbytes)) != 0:
            raise NotEnoughRam(
                f"could not pin {size(nbytes)} of RAM for copies to the GPU (CUDA error {error}).",
                "Pinned memory is limited by the system (about half of the RAM on Windows and WSL, ulimit -l).",
                "--offload disk, which pins a few buffers only.",
            )
        self._pinned.append(arena)
