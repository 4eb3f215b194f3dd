"""One engine somewhere in a cluster: takes requests, sweeps for a moment, and reports. Knows nothing of Ray."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from specexec.engine.request_types import Partial, Request, Result
from specexec.stats import Progress

REPORT_EVERY_S = 1.0


class Sweeps(Protocol):
    """What is needed of a batch (specexec/engine/batch.py)."""

    done: bool
    sweeps: int

    @property
    def partial(self) -> list[Partial]: ...

    def sweep(self) -> list[Result]: ...

    def close(self) -> None: ...


class BatchEngine(Protocol):
    """What a run needs of an engine; a whole cluster of them looks the same."""

    def batch(self, requests: Iterator[Request], parallel: int | Literal["auto"]) -> Sweeps: ...

    def progress(self) -> Progress: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Report:
    """What a worker has done since the last one, and how far its unfinished answers are."""

    results: list[Result]
    partial: list[Partial]
    sweeps: int
    bytes_read: int


class Inbox:
    """An iterator that may have more to give after it was empty: requests arrive while others are written."""

    def __init__(self) -> None:
        self.waiting: deque[Request] = deque()

    def __iter__(self) -> Inbox:
        return self

    def __next__(self) -> Request:
        if not self.waiting:
            raise StopIteration
        return self.waiting.popleft()


class ClusterWorker:
    """An engine of its own, opened where this object lives."""

    def __init__(self, opener: Callable[[], BatchEngine], parallel: int | Literal["auto"]) -> None:
        self._engine = opener()
        self._parallel = parallel
        self._inbox = Inbox()
        self._batch: Sweeps | None = None

    def pid(self) -> int:
        """The process to blame."""
        return os.getpid()

    def work(self, requests: list[Request]) -> Report:
        """Take these too, and sweep until something has ended, nothing is left, or it is time to report."""
        self._inbox.waiting.extend(requests)
        if self._batch is None or self._batch.done:
            self._batch = self._engine.batch(self._inbox, self._parallel)
        before, read_B = self._batch.sweeps, self._engine.progress().bytes_read
        until_s = time.monotonic() + REPORT_EVERY_S
        results: list[Result] = []
        while not results and not self._batch.done and time.monotonic() < until_s:
            results += self._batch.sweep()
        waiting = [Partial(request.index, request.written) for request in self._inbox.waiting]
        moved_B = self._engine.progress().bytes_read - read_B
        return Report(results, self._batch.partial + waiting, self._batch.sweeps - before, moved_B)
