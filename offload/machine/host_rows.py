"""Rows of keys and values between RAM or disk and where the computation is. Knows no token and no layer.

To a device: a copy stream of its own, and RAM that is pinned for as long as any tensor looks into it. On disk: files
without a name, which are gone with the process however it ends.
"""

import logging
import math
import mmap
import os
import resource
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from offload.errors import DiskFull
from offload.machine.accelerator import Accelerator, accelerator_of
from offload.machine.folders import folder_of
from offload.units import size

log = logging.getLogger(__name__)

SPARE_B = 1 << 30  # of a disk, left to others

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class HostCarrier:
    """RAM is where the computation is: a copy is over when it returns."""

    spare_rows = 0

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

    spare_rows = 0

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


class DiskCarrier:
    """Copies to and from files, in the order in which they were asked for, by a thread of its own.

    Files are mapped, and what was copied is let go of at once: it takes no memory of the process, only page cache,
    which the system gives to others when they need it.
    """

    spare_rows = 4096
    """Rows of a longer text are copied from file to file, so a new file has room for more of them."""

    def __init__(self, folder: Path, accelerator: Accelerator | None) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._copies = None if accelerator is None else accelerator.new_stream()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="KV on disk")
        self._moving: list[Future[None]] = []
        self._mapped: WeakValueDictionary[int, _Mapped] = WeakValueDictionary()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each layer of each text has two files

    def memory(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Room on disk for numbers of the dtype of `like`. Raises DiskFull."""
        self._let_go(self._mapped.values())
        size_B = max(1, math.prod(shape) * like.dtype.itemsize)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size_B)  # a write that finds no space would end the process
                held = _Mapped(file.fileno(), size_B)
        except OSError as error:
            raise DiskFull(
                f"{self._folder} has no room for {size(size_B)} of keys and values ({error.strerror}).",
                hint="--kv ram, a smaller --ctx, or --kv-quant 8.",
            ) from error
        flat = torch.frombuffer(held, dtype=torch.uint8)
        self._mapped[flat.data_ptr()] = held
        return flat[: math.prod(shape) * like.dtype.itemsize].view(like.dtype).view(shape)

    def copy(self, pairs: Pairs) -> None:
        """Start filling each first tensor from the second, once what was asked of the device so far is computed."""
        computed = None
        if self._accelerator is not None:
            computed = self._accelerator.new_event()
            computed.record(self._accelerator.current)
        self._moving.append(self._thread.submit(self._copy, list(pairs), computed))

    def receive(self) -> None:
        """What is asked of the device from now on finds the copies so far."""
        moving, self._moving = self._moving, []
        wait(moving)
        for one in moving:
            one.result()

    def settle(self) -> None:
        """Wait until nothing moves any more."""
        self.receive()

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], computed: torch.Event | None) -> None:
        with ExitStack() as beside:
            if self._accelerator is not None and self._copies is not None and computed is not None:
                beside.enter_context(self._accelerator.on(self._copies))
                self._copies.wait_event(computed)
            for target, source in pairs:
                target.copy_(source)  # which is over when it returns: a file cannot be pinned
        here = (tensor for pair in pairs for tensor in pair if tensor.device.type == "cpu")
        starts = {tensor.untyped_storage().data_ptr() for tensor in here}
        self._let_go(held for start in starts if (held := self._mapped.get(start)) is not None)

    def _let_go(self, mapped: Iterable[mmap.mmap]) -> None:
        for held in mapped:
            held.madvise(mmap.MADV_DONTNEED)  # of this process alone: a file keeps what was written


class _Mapped(mmap.mmap):
    """A file that goes when the last tensor that looks into it is gone."""


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


def kv_folder() -> Path:
    """Where keys and values lie on disk while a process needs them; listing it shows nothing."""
    return folder_of("cache") / "kv"


def check_room(size_B: int) -> None:
    """Raises DiskFull where so many bytes of keys and values would leave the disk with less than 1 GiB."""
    if not size_B:
        return
    folder = kv_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    free_B = shutil.disk_usage(folder).free
    if free_B < size_B + SPARE_B:
        raise DiskFull(
            f"keys and values of a full context take {size(size_B)} on disk, {folder} has {size(free_B)}.",
            "1 GiB stays free.",
            "a smaller --ctx, --kv-quant 8, or SPECEXEC_HOME on another disk.",
        )


def carrier_for(device: torch.device, on_disk: bool = False) -> HostCarrier | DeviceCarrier | DiskCarrier:
    """What copies keys and values between RAM, or the disk, and this device."""
    accelerator = accelerator_of(device)
    if on_disk:
        return DiskCarrier(kv_folder(), accelerator)
    return HostCarrier() if accelerator is None else DeviceCarrier(accelerator)
