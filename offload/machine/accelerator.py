"""A device with memory of its own, as copies see it: streams, events, pinned RAM. Of any maker; knows no layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offload.machine.pinning import pin, unpin


class Accelerator:
    """One device of those that torch.accelerator knows: `cuda` (NVIDIA, AMD) or `xpu` (Intel)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_stream(self) -> torch.Stream:
        """Work in a row of its own: nothing in it waits for other streams unless it is made to."""
        return torch.Stream(self.device)

    def new_event(self) -> torch.Event:
        """A point in a stream; waiting for one that was never recorded does nothing."""
        return torch.Event(self.device)

    @property
    def current(self) -> torch.Stream:
        """The stream of what the calling thread asks the device for."""
        return torch.accelerator.current_stream(self.device)

    @contextmanager
    def on(self, stream: torch.Stream) -> Iterator[None]:
        """The calling thread asks in this stream meanwhile. (A torch.Stream as a context keeps in itself where it was:
        two threads cannot be in one.)"""
        before = self.current
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def pin(self, address: int, nbytes: int) -> int:
        """Make RAM fit for copies that nothing waits for; 0, or the number of the error."""
        return pin(self.device, address, nbytes)

    def unpin(self, address: int) -> None:
        """Undo a `pin` that succeeded; no copy may be on its way."""
        unpin(self.device, address)


def accelerator_of(device: torch.device) -> Accelerator | None:
    """What copies to and from `device` go through; None where RAM is its memory."""
    return None if device.type == "cpu" else Accelerator(device)
