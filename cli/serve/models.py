"""The models of one server: loaded when they are asked for, unloaded to make room or when idle. Knows no engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cli.openai.parse import unknown_model
from cli.serve.metrics import Totals
from cli.serve.worker import State, Worker
from cli.serve.writing import STOPPING
from offload.errors import NotEnoughRam, NotEnoughVram

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

log = logging.getLogger(__name__)

_LOOK_S = 0.05  # between two looks at a model that is loading or leaving
_LATEST = ":latest"


@dataclass(eq=False)
class Hosted:
    """One model of a server under its names; `worker` has it loaded, or is loading it, or could not.

    `make` is called for every load and gives a worker that has not started.
    """

    names: tuple[str, ...]
    make: Callable[[Totals], Worker]
    totals: Totals = field(default_factory=Totals)
    worker: Worker | None = None
    leaving: bool = False
    held: int = 0  # by requests that are being read
    used_s: float = 0.0
    awaited: bool = False

    @property
    def state(self) -> State | Literal["unloaded"]:
        worker = self.worker  # another thread may let it go
        return worker.state if worker else "unloaded"

    @property
    def loaded(self) -> Worker | None:
        """Its worker, once that has an engine."""
        worker = self.worker
        return worker if worker and worker.state == "ok" else None

    @property
    def busy(self) -> bool:
        """Whether it writes, or a request is on its way to it."""
        worker = self.worker
        return bool(self.held or (worker and worker.busy))


class Models:
    """At most `most` models are loaded at once. With `idle_s` a model that had nothing to do for so long is unloaded.

    The first one is loaded at the start, every other one by the first request that names it; requests wait for that.
    """

    def __init__(self, hosted: Items[Hosted], most: int = 1, idle_s: float | None = None) -> None:
        self.hosted = tuple(hosted)
        self.on_failure: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None  # of the first load
        self._most, self._idle_s = most, idle_s
        self._changing = threading.RLock()
        self._one_load = threading.Lock()  # the next load counts the memory that this one has left
        self._stopping = threading.Event()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for one in self.hosted for name in one.names)

    @property
    def first(self) -> Hosted:
        """The model of those who name none."""
        return self.hosted[0]

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self._workers())

    @property
    def waiting(self) -> int:
        return sum(worker.waiting for worker in self._workers())

    def named(self, name: object) -> Hosted:
        """The model of this name; the first one for what is no name, which the reader of the request refuses.

        Raises ApiError for a name that is not known: nothing is loaded for it.
        """
        if not isinstance(name, str) or not name:
            return self.first
        wanted = name if name in self.names else name.removesuffix(_LATEST)
        found = next((one for one in self.hosted if wanted in one.names), None)
        if found is None:
            raise unknown_model(name, self.names)
        return found

    @asynccontextmanager
    async def using(self, name: object) -> AsyncIterator[Worker]:
        """The worker of a model that stays for the length of the block; what it was given to write keeps it longer.

        It may still be loading, if no request began that, or have failed. Raises ApiError for a name that is not known,
        and when the server stops.
        """
        hosted = self.named(name)
        while (worker := self._held(hosted)) is None:
            await asyncio.sleep(_LOOK_S)
        try:
            while hosted.awaited and worker.state == "loading":
                await asyncio.sleep(_LOOK_S)
            yield worker
        finally:
            with self._changing:
                hosted.held -= 1
                hosted.used_s = time.monotonic()

    def start(self) -> None:
        """Load the first model; if that fails the server ends."""
        with self._changing:
            worker = self.first.worker = self.first.make(self.first.totals)
            worker.on_failure = lambda: self._could_not_start(worker)
            self.first.used_s = time.monotonic()
        worker.start()
        if self._idle_s is not None:
            threading.Thread(target=self._watch, args=(self._idle_s,), name="idle models", daemon=True).start()

    def _could_not_start(self, worker: Worker) -> None:
        self.failure = worker.failure
        self.on_failure()

    def load(self, open_engine: Callable[[], Engine]) -> Engine:
        """Open an engine once there is room for it: a place, and memory. In the thread of its worker."""
        with self._one_load:
            while sum(one.loaded is not None for one in self.hosted) >= self._most:
                self._make_room()
            while True:
                try:
                    return open_engine()
                except (NotEnoughRam, NotEnoughVram):
                    if not self._make_room():
                        raise

    def unload(self, hosted: Hosted) -> None:
        """Wait until a model has nothing to do, and let it go."""
        while True:
            with self._one_load:
                if self._let_go(hosted):
                    return
            time.sleep(_LOOK_S)

    def begin_stopping(self) -> None:
        """Write no more; what runs ends after its current layer. Safe in a signal handler."""
        self._stopping.set()
        for worker in self._workers():
            worker.begin_stopping()

    def close(self) -> None:
        """Stop, and wait until the models have been let go."""
        self.begin_stopping()
        for worker in self._workers():
            worker.close()

    def _workers(self) -> Iterator[Worker]:
        return (worker for one in self.hosted if (worker := one.worker))

    def _held(self, hosted: Hosted) -> Worker | None:
        """Its worker, held; None while the model is on its way out. Raises ApiError when the server stops."""
        with self._changing:
            if hosted.leaving:
                return None
            ended = hosted.worker is None or (hosted.worker.state == "failed" and hosted.awaited)
            if ended and not self._stopping.is_set():
                hosted.worker, hosted.awaited = hosted.make(hosted.totals), True
                hosted.worker.start()
            if hosted.worker is None:
                raise STOPPING
            hosted.held += 1
            return hosted.worker

    def _make_room(self) -> bool:
        """Let go of the loaded model that was used longest ago, idle ones first; False if none is loaded."""
        loaded = [one for one in self.hosted if one.loaded]
        if not loaded or self._stopping.is_set():
            return False
        self._let_go(min(loaded, key=lambda one: (one.busy, one.used_s)))
        return True

    def _let_go(self, hosted: Hosted) -> bool:
        """False for a model whose turn to load comes after this thread's: the requests for it would never end."""
        with self._changing:
            if hosted.state == "loading":
                return False
            hosted.leaving = True  # new requests wait, so that those of another model get their turn
        try:
            while hosted.busy and not self._stopping.is_set():
                time.sleep(_LOOK_S)
            with self._changing:
                worker, hosted.worker = hosted.worker, None
            if worker is not None:
                worker.close()
                del worker
                gc.collect()  # the model's modules refer to each other
                log.info("unloaded %s", hosted.names[0])
        finally:
            hosted.leaving = False
        return True

    def _watch(self, idle_s: float) -> None:
        while not self._stopping.wait(min(1.0, idle_s / 4)):
            for one in self.hosted:
                if one.busy:
                    one.used_s = time.monotonic()
                elif one.loaded and time.monotonic() - one.used_s > idle_s:
                    self._unload_idle(one)

    def _unload_idle(self, hosted: Hosted) -> None:
        """Unless a model is being loaded, which may make room itself and takes its time."""
        if not self._one_load.acquire(blocking=False):
            return
        try:
            if hosted.loaded and not hosted.busy:
                self._let_go(hosted)
        finally:
            self._one_load.release()
