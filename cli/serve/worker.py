"""The one thread that owns the engine. Texts queue, join between two sweeps and leave when they are finished.

Knows nothing of HTTP: a Ticket says what to write and where the results go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cli.serve.cache_pool import IdleCaches
from cli.serve.metrics import Totals
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.stats import Burst
    from specexec.text.sequence import Sequence

log = logging.getLogger(__name__)

State = Literal["loading", "ok", "failed", "stopping"]
Tell = Callable[["Burst | Exception"], None]


class Full(Exception):
    """The line is as long as it may be; try again in `retry_s` seconds."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__(f"{waiting} texts are waiting already.")
        self.retry_s = retry_s


class Stopping(Exception):
    """The server is going down; what was written so far is all there will be."""


@dataclass(eq=False)
class Ticket:
    """One text to write. `tell` is called in the engine's thread with every burst, or once with an error.

    `images`: those of its prompt, held while it waits.
    """

    prompt: list[int]
    images: tuple[object, ...]
    sampling: SamplingParams
    tell: Tell
    gone: bool = False
    reused: int = 0
    asked_s: float = field(default_factory=time.monotonic)

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer may come to."""
        return len(self.prompt) + self.sampling.max_tokens


@dataclass(eq=False)
class Task:
    """Something else than a text to write, done between two sweeps. It is called with the engine and with the lengths
    of the texts that keep their memory meanwhile, and needs room for `longest` tokens beside them.
    """

    work: Callable[[Engine, list[int]], object]
    longest: int
    result: Future[object] = field(default_factory=Future)


class Worker:
    """Serves any number of texts with one engine, at most `parallel` of them in one sweep.

    `remembering` surrounds its work: what earlier runs knew, and what this one will leave behind. `totals` are those of
    earlier workers of the same model.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        *,
        parallel: int,
        max_queue: int,
        remembering: Callable[[Engine], AbstractContextManager[object]] = nullcontext,
        totals: Totals | None = None,
    ) -> None:
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.on_ready: Callable[[Engine], None] = lambda engine: None
        self.on_failure: Callable[[], None] = lambda: None
        self.totals = totals or Totals()
        self.parallel = parallel
        self.max_queue = max_queue
        self.started_s = time.monotonic()
        self.layers_read, self.layers_to_read = 0, 0
        self._open_engine = open_engine
        self._remembering = remembering
        self._engine: Engine | None = None
        self._waiting: deque[Ticket] = deque()
        self._live: dict[Sequence, Ticket] = {}
        self._tasks: deque[Task] = deque()
        self._idle = IdleCaches(parallel)
        self._mean_s = 1.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # For the threads of the server

    @property
    def engine(self) -> Engine:
        """The loaded engine; its own thread alone may write with it."""
        assert self._engine is not None, "ask only when `state` is ok"
        return self._engine

    @property
    def running(self) -> int:
        return len(self._live)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a text is being written or waits; a text on its way from the one to the other counts."""
        with self._changed:
            return bool(self._live or self._waiting or self._tasks)

    def start(self) -> None:
        """Begin loading."""
        self._thread.start()

    def layers_are_read(self, layers: int, of: int) -> None:
        """How far loading has come."""
        self.layers_read, self.layers_to_read = layers, of

    def submit(self, tickets: list[Ticket]) -> None:
        """Put texts in the line, all or none. Raises Full when the line has no end in sight."""
        with self._changed:
            if self.state == "stopping":
                raise Stopping("the server is stopping.")
            if len(self._waiting) + len(tickets) > self.max_queue + max(0, self.parallel - len(self._live)):
                self.totals.requests_rejected_total += len(tickets)
                raise Full(len(self._waiting), self._retry_s())
            self.totals.requests_total += len(tickets)
            self._waiting.extend(tickets)
            self._changed.notify()

    def do(self, task: Task) -> None:
        """Have something done as soon as there is room for it; no text begins before."""
        with self._changed:
            if self.state == "stopping":
                raise Stopping("the server is stopping.")
            self._tasks.append(task)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a text at once. The sweep is cut short, after its current layer, only if no other text needs it."""
        with self._changed:
            ticket.gone = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.totals.requests_cancelled_total += 1
            elif ticket in self._live.values() and all(other.gone for other in self._live.values()):
                self.engine.stop()

    def ahead(self, ticket: Ticket) -> int:
        """How many texts are before this one in the line; 0 once it is being written."""
        with self._changed:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def begin_stopping(self) -> None:
        """Stop after the current layer and notify all clients; returns at once. Safe in a signal handler."""
        with self._changed:  # an RLock below: the handler may find its own thread inside
            self.state = "stopping"
            if self._engine is not None:
                self._engine.stop()
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait until the model has been let go; a model that is still loading is not waited for."""
        self.begin_stopping()
        if self._engine is not None:
            self._thread.join()

    def _retry_s(self) -> int:
        rounds = (len(self._waiting) + len(self._live)) / self.parallel
        return max(1, min(600, round(rounds * self._mean_s)))

    # The engine's own thread

    def _work(self) -> None:
        try:
            self._engine = self._open_engine()
            with self._changed:
                ready = self.state == "loading"
                self.state = "ok" if ready else self.state
            if ready:
                self.on_ready(self._engine)
        except BaseException as error:
            self.failure = error
            self.state = "failed"
            self.on_failure()
            return
        with self._engine, self._remembering(self._engine):
            while self._admit():
                self._do_tasks()
                if self._live:
                    self._sweep()
            self._refuse_all()

    def _admit(self) -> bool:
        """Let leavers go and waiters in; waits until there is something to write. False when it is time to stop."""
        with self._changed:
            while True:
                for sequence in [sequence for sequence, ticket in self._live.items() if ticket.gone]:
                    self._end(sequence)
                if self.state == "stopping":
                    return False
                rows, before = 0, len(self._live)
                while self._waiting and not self._tasks and self._fits(self._waiting[0], rows):
                    if self._should_wait(self._waiting[0], list(self._live)[before:]):
                        break
                    rows += len(self._waiting[0].prompt)
                    self._begin(self._waiting.popleft())
                if self._live or self._tasks:
                    return True
                self._changed.wait()

    def _fits(self, ticket: Ticket, rows: int) -> bool:
        """Whether there is a place and memory for one more; what is merely kept for later makes room.

        The next sweep reads `rows` rows of newcomers' prompts already.
        """
        if len(self._live) == self.parallel or (rows and rows + len(ticket.prompt) > self.engine.room.rows):
            return False
        return self._has_room(ticket.longest)

    def _should_wait(self, ticket: Ticket, newcomers: list[Sequence]) -> bool:
        """Whether a text that begins in this sweep will have computed much of this prompt by the next one."""
        if not newcomers or ticket.sampling.prompt_logprobs:
            return False
        from specexec.engine.batch import WORTH_WAITING  # with torch, once an engine is there
        from specexec.model.cache import common_prefix

        shares = [common_prefix(other.tokens[:-1], ticket.prompt[:-1]) for other in newcomers]
        soon = max(shares)
        waits = soon >= self._idle.shared(ticket.prompt, [live.caches for live in self._live]) + WORTH_WAITING
        if waits:
            newcomers[shares.index(soon)].forks.add(soon)
        return waits

    def _has_room(self, tokens: int) -> bool:
        live = [other.longest for other in self._live.values()]
        while not self.engine.room.admits([*live, *self._idle.lengths], tokens):
            if not self._idle.lengths:
                return False
            self._idle.drop_oldest()
        return True

    def _do_tasks(self) -> None:
        """What there is room for; the rest waits until texts have ended."""
        while self._tasks and self._has_room(self._tasks[0].longest):
            task = self._tasks[0]
            held = [*(ticket.longest for ticket in self._live.values()), *self._idle.lengths]
            if task.result.set_running_or_notify_cancel():
                try:
                    task.result.set_result(task.work(self.engine, held))
                except Exception as error:
                    task.result.set_exception(error)
            with self._changed:
                self._tasks.popleft()

    def _begin(self, ticket: Ticket) -> None:
        computed = ticket.sampling.prompt_logprobs  # what is cached is not computed, so nothing could be said of it
        caches = self._idle.take([] if computed else ticket.prompt, live=[live.caches for live in self._live])
        try:
            sequence = self.engine.join(ticket.prompt, ticket.sampling, caches.by_model)
        except Exception as error:
            self._fail(ticket, error)
            return
        ticket.reused = sequence.processed
        self.totals.prompt_tokens_total += len(ticket.prompt)
        self.totals.prompt_tokens_reused_total += ticket.reused
        self._live[sequence] = ticket

    def _sweep(self) -> None:
        try:
            steps = self.engine.sweep(kept=self._idle.lengths)
        except Exception as error:
            log.exception("a sweep failed")
            with self._changed:
                failed, self._live = self._live, {}
            for sequence, ticket in failed.items():
                self.engine.leave(sequence)
                self._fail(ticket, error)
            return
        self._count([step.burst for step in steps])
        for step in steps:
            ticket = self._live[step.sequence]
            if step.sequence.failure is not None:
                self._fail(ticket, step.sequence.failure)
            elif not ticket.gone and step.burst.finish_reason != "interrupted":
                ticket.tell(step.burst)
            if step.burst.finish_reason:
                with self._changed:
                    self._end(step.sequence)

    def _end(self, sequence: Sequence) -> None:
        ticket = self._live.pop(sequence)
        self.engine.leave(sequence)
        self._idle.put(sequence.caches)
        self._mean_s += (time.monotonic() - ticket.asked_s - self._mean_s) / 8
        if ticket.gone:
            self.totals.requests_cancelled_total += 1
        elif sequence.finish_reason in (None, "interrupted"):
            ticket.tell(Stopping("the server is stopping."))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.totals.requests_failed_total += 1
        ticket.tell(error)

    def _refuse_all(self) -> None:
        with self._changed:
            for ticket in self._waiting:
                ticket.tell(Stopping("the server is stopping."))
            self._waiting.clear()
            for task in self._tasks:
                if task.result.set_running_or_notify_cancel():
                    task.result.set_exception(Stopping("the server is stopping."))
            self._tasks.clear()
            for sequence in list(self._live):
                self._end(sequence)

    def _count(self, bursts: list[Burst]) -> None:
        totals = self.totals
        totals.generated_tokens_total += sum(len(burst.tokens) for burst in bursts)
        totals.drafted_tokens_total += sum(burst.nodes for burst in bursts)
        totals.accepted_tokens_total += sum(burst.accepted for burst in bursts)
        totals.sweeps_total += 1
        totals.sweep_seconds_total += bursts[0].sweep_s  # one sweep served them all
        totals.draft_seconds_total += bursts[0].draft_s
        totals.read_bytes_total += bursts[0].bytes_read
