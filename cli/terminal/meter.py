"""Progress of an answer as two lines of text: the running sweep, and the totals so far.

Reads counters, changes nothing. Says as much as the terminal has room for.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cli.shared.quantities import format_count, format_speed

if TYPE_CHECKING:
    from specexec.stats import Burst, Progress

_WINDOW_S = 1.0
BAR = 16
BAR_COLUMNS = 60  # a narrower terminal shows numbers alone
SHOWN_SWEEPS = 24
_EIGHTHS = "▁▂▃▄▅▆▇█"
TALLEST = 8  # tokens of a full column, unless a sweep gave more


class Metered(Protocol):
    """What is measured: a sweep over layers, and a context that fills."""

    @property
    def context(self) -> int: ...

    def progress(self) -> Progress: ...


class SweepMeter:
    """Follows the engine from a timer thread; the speed of the link is that of the last second.

    `used` counts the tokens of the context; it is asked once, after the first sweep.
    """

    def __init__(self, engine: Metered, used: Callable[[], int] | None = None) -> None:
        self.stopping = False
        self.thinking = False  # whether what is written now is hidden
        self._engine = engine
        self._used = used
        self._context_tokens: int | None = None
        self._each: list[int] = []  # tokens of every sweep
        self._began_s = time.monotonic()
        self._sweep, self._sweep_began_s = engine.progress().sweeps, self._began_s
        self._read: deque[tuple[float, int]] = deque()

    def next_sweep(self, burst: Burst) -> None:
        """A burst has arrived: the next sweep is under way."""
        if self._context_tokens is not None:
            self._context_tokens += len(burst.tokens)
        elif self._used is not None:
            self._context_tokens = self._used()
        self._each.append(len(burst.tokens))

    def lines(self) -> str:
        """How far the sweep is, now; from the second sweep on also how it has gone."""
        now, columns = self._engine.progress(), shutil.get_terminal_size().columns
        return "\n".join([self._this_sweep(now, columns), *([self._so_far(columns)] if self._each else [])])

    def _this_sweep(self, now: Progress, columns: int) -> str:
        place = f"layer {now.layer}/{now.layers}"
        if self.stopping:
            return f"  stopping… ({place})"
        sweep = f"sweep {len(self._each) + 1}"
        facts = [f"{sweep} {place}"]
        if self.thinking:
            facts.insert(0, f"thinking… {format_count(sum(self._each))} tokens")
        elif not self._each:
            facts.insert(0, "reading the prompt")
        speed_Bps, left_s = self._speed_Bps(now.bytes_read), self._left_s(now)
        if speed_Bps:
            facts.append(format_speed(speed_Bps))
        if left_s is not None:
            facts.append(f"{left_s:.1f} s left")
        line = _fitting(facts, columns)
        drawn = line.replace(sweep, f"{sweep} {bar(now.layer, now.layers)}")
        return drawn if columns >= BAR_COLUMNS and len(drawn) < columns else line

    def _so_far(self, columns: int) -> str:
        tokens, seconds = sum(self._each), time.monotonic() - self._began_s
        facts = [
            f"{sparkline(self._each, columns)} {tokens / len(self._each):.1f} tok/sweep",
            f"{tokens / seconds:.1f} tok/s",
            f"{format_count(tokens)} tokens",
            f"{seconds:.1f} s",
        ]
        if self._context_tokens is not None:
            facts.append(f"context {format_count(self._context_tokens)}/{format_count(self._engine.context)}")
        return _fitting(facts, columns)

    def _left_s(self, now: Progress) -> float | None:
        """Layers are of one size: what is left takes as long as what is done, layer for layer."""
        at_s = time.monotonic()
        if now.sweeps != self._sweep:
            self._sweep, self._sweep_began_s = now.sweeps, at_s
        if not 0 < now.layer < now.layers:
            return None
        return (at_s - self._sweep_began_s) * (now.layers - now.layer) / now.layer

    def _speed_Bps(self, bytes_read: int) -> float:
        now_s = time.monotonic()
        if self._read and bytes_read < self._read[-1][1]:  # another answer counts from zero
            self._read.clear()
        self._read.append((now_s, bytes_read))
        while now_s - self._read[0][0] > _WINDOW_S:
            self._read.popleft()
        (first_s, first), (last_s, last) = self._read[0], self._read[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def bar(done: int, all: int) -> str:
    """████████░░░░░░░░"""
    full = BAR * done // all if all else 0
    return "█" * full + "░" * (BAR - full)


def sparkline(each: list[int], columns: int = 80) -> str:
    """A column for each of the last numbers, all on one scale; fewer where the terminal is narrow."""
    tallest, shown = max(TALLEST, *each), min(SHOWN_SWEEPS, max(columns - 56, 4))
    return "".join(_EIGHTHS[min(7, 8 * number // (tallest + 1))] for number in each[-shown:])


def _fitting(facts: list[str], columns: int) -> str:
    """The first facts on one line, whole ones."""
    line = f"  {facts[0]}"
    for fact in facts[1:]:
        if len(line) + len(fact) + 3 >= columns:
            break
        line += f" · {fact}"
    return line
