"""Rows of keys and values between RAM and where the computation is. Knows no token, no layer and no file.

To a device: a copy stream of its own, and RAM that is pinned for as long as any tensor looks into it.
"""

import logging
import math
import mmap
from collections.abc import Iterable

import torch

from offload.machine.accelerator import Accelerator, accelerator_of
from offload.units import size

log = logging.getLogger(__name__)

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class HostCarrier:
    """RAM is where the computation is: a copy is over when it returns."""

    def memory(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """RAM for numbers of the dtype of `like`."""
        return torch.empty(shape, dtype=like.dtype)

    def copy(self, pairs: Pairs) -> None:
        """Fill each first tensor from the second."""
        for target, source in pairs:
            target.copy_(source)

    def receive(self) -> None:
        """It is there."""

    def settle(self) -> None:
        """Nothing moves."""


class DeviceCarrier:
    """Copies over PCIe in both directions, in the order in which they were asked for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._copies = accelerator.new_stream()
        self._warned = False

    def memory(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Pinned RAM; where the system allows no more of it, plain RAM, from which copies are slower."""
        try:
            held = _Pinned(-1, max(1, math.prod(shape) * like.dtype.itemsize))
        except OSError as error:
            raise MemoryError("RAM for keys and values") from error
        flat = torch.frombuffer(held, dtype=torch.uint8)
        if not held.pin(self._accelerator, flat.data_ptr()) and not self._warned:
            self._warned = True
            log.warning("could not pin %s of RAM for keys and values: their copies are slower.", size(len(held)))
        return flat[: math.prod(shape) * like.dtype.itemsize].view(like.dtype).view(shape)

    def copy(self, pairs: Pairs) -> None:
        """Start filling each first tensor from the second, once what was asked of the device so far is computed."""
        self._copies.wait_stream(self._accelerator.current)
        with self._accelerator.on(self._copies):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def receive(self) -> None:
        """What is asked of the device from now on waits for the copies so far."""
        self._accelerator.current.wait_stream(self._copies)

    def settle(self) -> None:
        """Wait until nothing moves any more."""
        self._copies.synchronize()


class _Pinned(mmap.mmap):
    """Exactly as much memory as asked for; unpinned when the last tensor that looks into it is gone."""

    _at: tuple[Accelerator, int] | None = None

    def pin(self, accelerator: Accelerator, address: int) -> bool:
        if accelerator.pin(address, len(self)) != 0:
            return False
        self._at = accelerator, address
        return True

    def __del__(self) -> None:
        if self._at is not None:
            accelerator, address = self._at
            accelerator.unpin(address)


def carrier_for(device: torch.device) -> HostCarrier | DeviceCarrier:
    """What copies keys and values between RAM and this device."""
    accelerator = accelerator_of(device)
    return HostCarrier() if accelerator is None else DeviceCarrier(accelerator)
