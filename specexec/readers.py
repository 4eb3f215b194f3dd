"""Bursts of several texts for as many readers: whoever waits for the next one lets the sweep run that serves all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from specexec.decoder import Decoder
from specexec.sequence import Sequence
from specexec.stats import Burst


class Readers:
    """Keeps each text's bursts until its reader comes for them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._bursts: dict[Sequence, deque[Burst]] = {}

    def read(self, sequence: Sequence) -> Iterator[Burst]:
        """Write this text to its end, beside those that others read; a reader that leaves early ends it."""
        self._bursts[sequence] = deque()
        self._decoder.join(sequence)
        try:
            while sequence.finish_reason is None or self._bursts[sequence]:
                while not self._bursts[sequence]:
                    for step in self._decoder.step():
                        self._bursts[step.sequence].append(step.burst)
                yield self._bursts[sequence].popleft()
            if sequence.failure is not None:
                raise sequence.failure
        finally:
            del self._bursts[sequence]
            if sequence in self._decoder.live:  # the reader left early, or the sweep failed
                self._decoder.leave(sequence)
