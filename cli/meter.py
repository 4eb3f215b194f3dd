"""The sweep in progress as one line of text: `sweep 9 · layer 56/80 · 22.1 GB/s`. Reads counters, changes nothing."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from cli.quantities import format_speed

if TYPE_CHECKING:
    from specexec.engine import Engine

_WINDOW_S = 1.0


class SweepMeter:
    """Follows the engine from a timer thread; the speed is that of the last second."""

    def __init__(self, engine: Engine) -> None:
        self.stopping = False
        self._engine = engine
        self._sweep = 1
        self._read: deque[tuple[float, int]] = deque()

    def next_sweep(self) -> None:
        """A burst has arrived: the next sweep is under way."""
        self._sweep += 1

    def line(self) -> str:
        """How far the sweep is, now."""
        now = self._engine.progress()
        place = f"layer {now.layer}/{now.layers}"
        if self.stopping:
            return f"  stopping… ({place})"
        speed_Bps = self._speed_Bps(now.bytes_read)
        facts = [f"sweep {self._sweep}", place, *([format_speed(speed_Bps)] if speed_Bps else [])]
        return "  " + " · ".join(facts)

    def _speed_Bps(self, bytes_read: int) -> float:
        now_s = time.monotonic()
        if self._read and bytes_read < self._read[-1][1]:  # a new sweep counts from zero
            self._read.clear()
        self._read.append((now_s, bytes_read))
        while now_s - self._read[0][0] > _WINDOW_S:
            self._read.popleft()
        (first_s, first), (last_s, last) = self._read[0], self._read[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0
