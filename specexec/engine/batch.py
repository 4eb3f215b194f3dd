"""Many prompts through one decoder: which are running, which wait, and the results.

A sweep over the weights costs the same for one text as for thirty, so a text that ends is replaced in the next sweep,
and a newcomer's prompt rides along with the trees of the others. Texts that begin alike share keys and values.
Knows no file, no device and no model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from specexec.engine.decoder import Step
from specexec.engine.request_types import Failure, Partial, Request, Result
from specexec.errors import SpecexecError
from specexec.model.cache import common_prefix
from specexec.planning.memory_room import Room
from specexec.sampling.verify import Acceptance
from specexec.stats import Burst, Completion, Logprob
from specexec.text.sequence import Sequence

log = logging.getLogger(__name__)

UNSHARED = nullcontext()  # no other caller uses the decoder
MOST_PARALLEL = 64  # beyond this even small trees reach the arithmetic's limit on every machine we know
# A copy is cheaper than computing even a short prefix again, but waiting a sweep for one must save real work.
WORTH_COPYING = 16
WORTH_WAITING = 256


Prepare: TypeAlias = Callable[[Request], Sequence]


class Sweeper(Protocol):
    """What a batch needs of the decoder."""

    def join(self, sequence: Sequence) -> None: ...

    def leave(self, sequence: Sequence) -> None: ...

    def step(self) -> list[Step]: ...


@dataclass(eq=False)
class _Answer:
    """A text on its way, and what it has cost so far."""

    request: Request
    sequence: Sequence
    text: str = ""
    sweeps: int = 0
    nodes: int = 0
    accepted: int = 0
    bytes_read: float = 0.0
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()
    replaced: tuple[int, ...] = ()
    began_s: float = field(default_factory=time.perf_counter)

    def add(self, burst: Burst, sharers: int) -> None:
        """One more sweep, which `sharers` texts had together."""
        self.text += burst.text
        self.sweeps += bool(burst.tokens)
        self.nodes += burst.nodes
        self.accepted += burst.accepted
        self.bytes_read += burst.bytes_read / sharers
        self.logprobs += burst.logprobs
        self.prompt_logprobs += burst.prompt_logprobs
        self.replaced += (burst.replaced,) if burst.replaced else ()

    def result(self) -> Result:
        if self.sequence.failure is not None:
            return Failure(self.request.index, self.sequence.failure)
        return self.completion()

    def completion(self) -> Completion:
        assert self.sequence.finish_reason is not None
        return Completion(
            index=self.request.index,
            text=self.text,
            tokens=tuple(self.sequence.answer),
            finish_reason=self.sequence.finish_reason,
            prompt_tokens=self.sequence.prompt_length + self.sequence.unread,
            unread=self.sequence.unread,
            kv_dropped=self.sequence.kv_dropped,
            seed=self.sequence.noise.seed,
            sweeps=self.sweeps,
            nodes=self.nodes,
            accepted=self.accepted,
            bytes_read=round(self.bytes_read),
            seconds=time.perf_counter() - self.began_s,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            limit=self.sequence.ended_by,
            replaced=self.replaced,
        )


class Batch:
    """Answers every request; at most `parallel` at a time, and no more than `room` holds. Results come as they finish.

    A text depends on its own prompt and seed alone, never on the others. Requests are taken when there is a place
    for them, so they may come from an endless iterator. `lock` keeps other threads' sweeps off the caches of its texts.
    """

    def __init__(
        self,
        decoder: Sweeper,
        prepare: Prepare,
        room: Room,
        requests: Iterable[Request],
        parallel: int = MOST_PARALLEL,
        lock: AbstractContextManager[object] = UNSHARED,
    ) -> None:
        assert parallel > 0
        self.done = False
        self.sweeps = 0
        self._decoder = decoder
        self._prepare = prepare
        self._room = room
        self._requests = iter(requests)
        self._parallel = parallel
        self._next: _Answer | None = None
        self._live: dict[Sequence, _Answer] = {}
        self._donors: list[Sequence] = []
        self._crowded = False
        self._lock = lock

    def __iter__(self) -> Iterator[Result]:
        try:
            while not self.done:
                yield from self.sweep()
        finally:
            self.close()

    @property
    def live(self) -> int:
        """Answers on their way."""
        return len(self._live)

    @property
    def lengths(self) -> list[int]:
        """The tokens that each of these may come to have, prompt included."""
        return [one.longest for one in self._live]

    @property
    def partial(self) -> list[Partial]:
        """The unfinished answers, as of the last sweep; also after an error or an interrupt."""
        return [Partial(one.request.index, tuple(one.sequence.answer)) for one in self._live.values()]

    def sweep(self) -> list[Result]:
        """Admit newcomers, write at all texts once, and return what has ended.

        When the decoder is stopped, the unfinished answers end as interrupted and the batch is done.
        """
        results = self._admit()
        steps = self._decoder.step() if self._live else []
        self._donors = list(self._live)
        self.sweeps += bool(steps)
        for step in steps:
            self._live[step.sequence].add(step.burst, len(steps))
            if step.burst.finish_reason is not None:
                results.append(self._live.pop(step.sequence).result())
                self.done |= step.burst.finish_reason == "interrupted"
        return results

    def close(self) -> None:
        """Leave the decoder to others; unfinished answers are dropped."""
        self.done = True
        for sequence in self._live:
            self._decoder.leave(sequence)
        self._live.clear()
        self._donors.clear()

    def _admit(self) -> list[Result]:
        """Fill the free places; requests that end before they begin give their results at once."""
        results: list[Result] = []
        newcomers: list[Sequence] = []
        rows = 0
        while len(self._live) < self._parallel:
            answer = self._next or self._take(results)
            self._next = answer
            if answer is None or not self._fits(answer) or self._should_wait(answer.sequence, newcomers):
                break
            new = len(answer.sequence.tokens) - self._best_donor(answer.sequence)[0]
            if newcomers and rows + new > self._room.rows:  # the others' prompts are enough for one sweep
                break
            self._next = None
            rows += new
            self._borrow(answer.sequence)
            self._decoder.join(answer.sequence)
            self._live[answer.sequence] = answer
            newcomers.append(answer.sequence)
        self._donors = []
        self.done |= not self._live and self._next is None
        return results

    def _take(self, results: list[Result]) -> _Answer | None:
        """The next request that has something to write."""
        for request in self._requests:
            try:
                sequence = self._prepare(request)
            except SpecexecError as error:
                results.append(Failure(request.index, error))
                continue
            answer = _Answer(request, sequence)
            if request.written and sequence.finish_reason is None:
                answer.text = sequence.accept(Acceptance((), request.written)).text
            if sequence.finish_reason is None:
                return answer
            results.append(answer.completion())
        return None

    def _fits(self, answer: _Answer) -> bool:
        lengths = [one.longest for one in self._live]
        ended = [one.longest for one in self._donors if one not in self._live]
        if not self._room.admits([*lengths, *ended], answer.sequence.longest):
            self._donors = list(self._live)  # memory is worth more than what could be copied from them
        fits = self._room.admits(lengths, answer.sequence.longest)
        if not fits and not self._crowded:
            self._crowded = True
            log.warning(
                "memory holds %d answers at a time, not %d: %d bytes for keys and values, %d for a token.",
                len(lengths), self._parallel, self._room.free_B, self._room.token_B,
            )  # fmt: skip
        return fits

    def _should_wait(self, sequence: Sequence, newcomers: list[Sequence]) -> bool:
        """Whether a text that begins in this sweep will have computed much of this prompt by the next one."""
        other = max(newcomers, key=lambda other: _shared(sequence, other), default=None)
        soon = _shared(sequence, other) if other else 0
        waits = soon >= WORTH_WAITING and soon > self._best_donor(sequence)[0]
        if waits and other:
            other.forks.add(soon)
        return waits

    def _best_donor(self, sequence: Sequence) -> tuple[int, Sequence | None]:
        donors = [*self._donors, *(one for one in self._live if one not in self._donors)]
        with self._lock:
            shares = [(_cached(donor, _shared(sequence, donor)), at) for at, donor in enumerate(donors)]
        length, at = max(shares, default=(0, -1))
        return length, donors[at] if length else None

    def _borrow(self, sequence: Sequence) -> None:
        """Copy keys and values of the longest beginning that another text has already been through."""
        if sequence.sampling.prompt_logprobs:  # every row is asked for, and what is copied is not computed
            return
        with self._lock:
            length, donor = self._best_donor(sequence)
            if donor is not None and length >= WORTH_COPYING and not sequence.caches:
                sequence.caches.update({model: cache.prefix(length) for model, cache in donor.caches.items()})
                sequence.processed = length


def _shared(left: Sequence, right: Sequence) -> int:
    return common_prefix(left.tokens[:-1], right.tokens)


def _cached(sequence: Sequence, shared: int) -> int:
    """How many of the shared tokens can be copied."""
    return max((cache.reusable(shared) for cache in sequence.caches.values()), default=0)
