"""How long a run will still take, as a range: answers differ in length, and few have ended early in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LEAST_DOUBT = 0.1  # of the speed, even where all answers are of one length


@dataclass
class TimeLeft:
    """Learns from finished answers. `longest` is what an answer may have at most, in tokens."""

    longest: int
    count: int = 0
    total: float = 0.0
    squares: float = field(default=0.0, repr=False)

    def learn(self, tokens: int) -> None:
        """One answer has ended with so many tokens."""
        self.count += 1
        self.total += tokens
        self.squares += tokens * tokens

    def left_s(self, items: int, written: int, tokens_per_s: float) -> tuple[float, float] | None:
        """Seconds for `items` more answers of which `written` tokens exist; None while nothing is known."""
        if not self.count or tokens_per_s <= 0:
            return None
        mean = self.total / self.count
        spread = math.sqrt(max(self.squares / self.count - mean * mean, 0.0)) if self.count > 1 else mean
        # Two standard errors: of the mean so far, and of the sum of those to come.
        doubt = max(2 * spread * math.sqrt(1 / self.count + 1 / max(items, 1)), LEAST_DOUBT * mean)
        low, high = max(mean - doubt, 0.3 * mean), min(mean + doubt, float(self.longest))
        return tuple(max(items * each - written, 0.0) / tokens_per_s for each in (low, max(high, mean)))  # type: ignore[return-value]


def spelled(left: tuple[float, float]) -> str:
    """1 h 10–1 h 40, 3–5 min, 20–40 s: rounded outwards."""
    low, high = left
    if high < 100:
        return f"{math.floor(low)}–{math.ceil(high)} s"
    low_min, high_min = math.floor(low / 60), math.ceil(high / 60)
    if high < 100 * 60:
        return f"{low_min}–{high_min} min"
    return "–".join(f"{minutes // 60} h {minutes % 60:02d}" for minutes in (low_min, high_min))
