"""What the process holds, judged so that other tests' leftovers, which come and go when they like, change nothing."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Held(NamedTuple):
    """What the process holds, or how much more of it."""

    files: int
    threads: int
    tensors: int
    memory_B: int


def held() -> Held:
    """Now, once all garbage is collected."""
    gc.collect()
    process = psutil.Process()
    tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    return Held(process.num_fds(), threading.active_count(), tensors, process.memory_info().rss)


def added_by_every(act: Callable[[], object], times: int = 3) -> Held:
    """The least that a call of `act` adds, after one whose additions do not count.

    What leaks is added by every call; what this process makes lazily, or in other tests' threads, is not.
    """
    act()
    seen = [held()]
    for _ in range(times):
        act()
        seen.append(held())
    grown = [[now - then for then, now in zip(*pair, strict=True)] for pair in pairwise(seen)]
    return Held(*map(min, zip(*grown, strict=True)))


def open_below(path: Path) -> list[str]:
    """This file, or those in this folder, once for each descriptor that the process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # of the listing itself, or closed meanwhile
            continue
    return [file for file in found if Path(file).is_relative_to(path.resolve())]


def started_since(before: set[threading.Thread]) -> set[threading.Thread]:
    """Threads that run and did not then, but for the one that closes what the garbage collector finds."""
    return {thread for thread in {*threading.enumerate()} - before if thread.name != "closer"}
