"""One decoder for several callers and threads: each receives the results of its own texts, whichever ran the sweep.

Sweeps run one at a time, under a lock that is free between them: a caller that pauses or leaves stops no other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TypeVar

from specexec.engine.decoder import Decoder, Step
from specexec.engine.prefixes import NoPrefixes, Prefixes
from specexec.errors import EngineClosed
from specexec.model.cache import common_prefix
from specexec.stats import Burst
from specexec.text.sequence import Sequence

Found = TypeVar("Found")


class Readers:
    """Runs the sweeps of a decoder and hands every step to the caller whose text it is."""

    def __init__(self, decoder: Decoder) -> None:
        self.lock = threading.RLock()
        self.closed = False
        self.prefixes: Prefixes = NoPrefixes()
        self._decoder = decoder
        self._callers: dict[Sequence, Caller] = {}
        self._sweeping = False
        self._left: list[Sequence] = []

    def caller(self) -> Caller:
        """A caller with texts of its own."""
        return Caller(self)

    def read(self, sequence: Sequence) -> Iterator[Burst]:
        """Write this text to its end, beside those of others; a reader that leaves early ends it."""
        caller = self.caller()
        caller.join(sequence)
        try:
            ended = sequence.finish_reason is not None
            while not ended:
                for step in caller.step():
                    ended = step.burst.finish_reason is not None
                    yield step.burst
            if sequence.failure is not None:
                raise sequence.failure
        finally:
            caller.leave(sequence)

    def one_by_one(self, found: Iterator[Found]) -> Iterator[Found]:
        """The same, each of them found while no sweep runs."""
        while True:
            with self.lock:
                self._check_open()
                one = next(found, None)
            if one is None:
                return
            yield one

    def join(self, sequence: Sequence, caller: Caller) -> None:
        with self.lock:
            self._check_open()
            self._fill(sequence)
            self._decoder.join(sequence)
            if sequence.finish_reason is None:
                self._callers[sequence] = caller

    def leave(self, sequence: Sequence) -> None:
        with self.lock:
            if self._sweeping:  # the garbage collector may close a dropped stream in any thread
                self._left.append(sequence)
            elif self._callers.pop(sequence, None) is not None and sequence in self._decoder.live:
                self._decoder.leave(sequence)
                self.prefixes.keep(sequence.caches)

    def sweep(self, kept: Items[int]) -> None:
        """One sweep over the texts of all callers; after an error none of them has moved."""
        self._check_open()
        self._sweeping = True
        try:
            steps = self._decoder.step(kept)
        finally:
            self._sweeping = False
        for step in steps:
            ended = step.burst.finish_reason is not None
            caller = self._callers.pop(step.sequence) if ended else self._callers[step.sequence]
            caller.waiting.append(step)
            if ended:
                self.prefixes.keep(step.sequence.caches)
        for sequence in self._left:
            self.leave(sequence)
        self._left.clear()

    def _fill(self, sequence: Sequence) -> None:
        if sequence.finish_reason is not None or sequence.sampling.prompt_logprobs:
            return  # nothing is written, or every row is asked for
        self.prefixes.fill(sequence.tokens[:-1], sequence.caches)
        if (cache := sequence.caches.get(self._decoder.target)) is not None:
            sequence.processed = cache.reusable(common_prefix(cache.tokens, sequence.tokens[:-1]))

    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed("the engine is closed.", hint="load the model again.")


class Caller:
    """What a reader, a batch or a server needs of a decoder that it shares."""

    def __init__(self, readers: Readers) -> None:
        self.waiting: deque[Step] = deque()
        self._readers = readers

    def join(self, sequence: Sequence) -> None:
        """From the next sweep on, write this text too."""
        self._readers.join(sequence, self)

    def leave(self, sequence: Sequence) -> None:
        """Stop writing this text, if it has not ended already."""
        self._readers.leave(sequence)

    def step(self, kept: Items[int] = ()) -> list[Step]:
        """What became of the own texts: in sweeps that others ran meanwhile, else in one more."""
        with self._readers.lock:
            if not self.waiting:
                self._readers.sweep(kept)
            steps = list(self.waiting)
            self.waiting.clear()
        return steps
