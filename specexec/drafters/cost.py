"""The time of a sweep and of a drafter pass, learned while running; and how many guesses are worth their seconds.

A sweep over n rows takes max(s + t n, a + b n): the weights have to travel whatever n is, and arithmetic grows with n.
t is small: what is computed while nothing travels, as behind the last layer. Among experts the stream grows too, by the
function `share`, which the stream of the weights gives and learns from the experts that sweeps visited.
tokens/s = (1 + sum of reach) / (drafting + sweep), so a node is worth it while its reach beats its share of that rate.
N nodes, best first
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specexec.learned import Arrays, sound
from specexec.tree.tree import Floats

FADE = 0.95  # of a sample's weight with every newer one
REMEMBERED = 2.0  # samples that an earlier run is worth: the machine may be busier or freer today
ALIKE = 1e-3  # of the squared mean: where rows vary by less, their seconds say little about the slope


@dataclass
class Line:
    """Seconds = base + slope * rows, by discounted least squares; neither may be negative.

    With samples of one size only, the share `growing` of the time is taken to grow with the rows.
    """

    growing: float = 0.5
    sums: Floats = field(default_factory=lambda: np.zeros(5))  # weight, n, t, n², n t
    most: int = 0  # rows of the largest sample: further out the line is a guess

    def learn(self, rows: int, seconds: float) -> None:
        if self.sums[0] > 2 and rows <= self.most:  # where it is known: one slow sample is not a trend
            seconds = min(seconds, 2 * float(self.at(rows)))
        self.most = max(self.most, rows)
        self.sums = FADE * self.sums + np.array([1.0, rows, seconds, rows * rows, rows * seconds])

    @property
    def known(self) -> bool:
        return bool(self.sums[0] > 0)

    def coefficients(self) -> tuple[float, float]:
        """(base, slope)."""
        weight, n, t, nn, nt = self.sums.tolist()
        mean_n, mean_t = n / weight, t / weight
        spread = max(nn / weight - mean_n**2, 0.0)
        doubt = max(ALIKE * mean_n**2 - spread, 0.0)
        slope = (nt / weight - mean_n * mean_t + doubt * self.growing * mean_t / mean_n) / (spread + doubt)
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return mean_t - slope * mean_n, slope

    def pack(self) -> Floats:
        """Its sums and the largest sample, [6]."""
        return np.append(self.sums * min(1.0, REMEMBERED / max(float(self.sums[0]), 1e-9)), self.most)

    @staticmethod
    def unpacked(row: NDArray[np.generic], growing: float = 0.5) -> Line:
        """What `pack` gave. Raises ValueError for sums that no samples have."""
        *sums, most = sound(row, (6,), "a line of costs").tolist()
        if any(sums) and not (sums[0] >= 1 and sums[1] >= 1 and sums[2] > 0 and most >= 1):
            raise ValueError("a line of costs was learned from nothing")
        return Line(growing, np.array(sums), int(most))

    def at(self, rows: Floats | float) -> Floats:
        base, slope = self.coefficients()
        return np.asarray(base + slope * np.asarray(rows))


@dataclass
class CostModel:
    """Measured seconds of this target and this drafter on this machine."""

    compute: Line = field(default_factory=Line)
    draft: Line = field(default_factory=Line)
    stream: Line = field(default_factory=lambda: Line(growing=0.0))  # of a sweep that brings all weights and waits
    share: Callable[[Floats | float], Floats] = np.ones_like  # of the weights, that a sweep over so many rows brings
    gain: float = 0.5  # share of the reach of asked nodes that their children won, lately
    rate: float = 0.0  # tokens per second lately; 0 where seconds do not decide
    apart: bool = False  # the drafter computes on another device: what it does meanwhile takes nothing from a sweep

    def learn_sweep(self, rows: int, seconds: float, waited_s: float, prompt: bool = False) -> None:
        """A sweep over `rows` rows took `seconds`; for `waited_s` of them the arithmetic stood still for weights.

        Where it read a `prompt`, it says nothing about how guesses lengthen a sweep that waits.
        """
        self.compute.learn(rows, max(seconds - waited_s, 1e-6))
        whole_s = seconds / float(self.share(float(rows)))
        # Only a sweep that waited measures the seconds of the transfer; one that did not gives an upper bound.
        if waited_s <= 0.05 * seconds:
            whole_s = min(float(self.stream.at(rows)), whole_s) if self.stream.known else 0.0
        if whole_s and not prompt:
            self.stream.learn(rows, whole_s)

    def learn_draft(self, rows: int, seconds: float, asked_reach: float, won_reach: float) -> None:
        """A drafter pass over `rows` nodes; their children won `won_reach` for the best tree."""
        self.draft.learn(rows, seconds)
        if asked_reach > 0:
            self.gain = 0.9 * self.gain + 0.1 * min(won_reach / asked_reach, 1.0)

    def learn_rate(self, tokens: int, seconds: float) -> None:
        """So many tokens were written in so many seconds, drafting included; none: a fixed budget counts no seconds."""
        now = tokens / max(seconds, 1e-9)
        self.rate = 0.8 * self.rate + 0.2 * now if self.rate and tokens else now

    def floor(self, price: Line) -> float:
        """Reach (a log-probability) below which one more node wins less than its seconds: drafter passes at `price`."""
        if not (self.rate and price.known):
            return -np.inf
        slope = price.coefficients()[1]
        return float(np.log(max(self.rate * slope / max(self.gain, 1e-3), 1e-300)))

    def pack(self) -> dict[str, Floats]:
        """Seconds by rows of a sweep and of a drafter pass, the wire's seconds, and what a pass wins."""
        if not self.compute.known:
            return {}
        lines = {"compute": self.compute, "draft": self.draft, "stream": self.stream}
        return {name: line.pack() for name, line in lines.items()} | {"gain": np.array([self.gain])}

    def unpack(self, arrays: Arrays) -> None:
        """What an earlier run on this machine, placed alike, measured. Raises ValueError for what it cannot have."""
        nothing = np.zeros(0)
        (gain,) = sound(arrays.get("gain", nothing), (1,), "costs").tolist()
        compute = Line.unpacked(arrays.get("compute", nothing))
        stream = Line.unpacked(arrays.get("stream", nothing), self.stream.growing)
        if gain > 1 or not compute.known:
            raise ValueError("these costs cannot have been measured")
        self.draft = Line.unpacked(arrays.get("draft", nothing))
        self.compute, self.stream, self.gain = compute, stream, gain

    def sweep_s(self, rows: Floats | float) -> Floats:
        """Predicted seconds of a sweep."""
        return np.maximum(self.compute.at(rows), self._streamed_s(rows))

    def idle_s(self, rows: int) -> float:
        """Seconds of a sweep that a drafter may have: while it waits for weights, or all of them."""
        if not self.compute.known:
            return 0.0
        return float(self.sweep_s(rows) if self.apart else self._streamed_s(rows) - self.compute.at(rows))

    def _streamed_s(self, rows: Floats | float) -> Floats:
        """A sweep that waits, for as many experts as so many rows visit."""
        return np.asarray(self.stream.at(rows) * self.share(rows)) if self.stream.known else np.zeros_like(rows)

    def best_size(self, reach_N: Floats, rows: int, sequences: int, drafted_s: float) -> int:
        """How many of the nodes (their chances, best first, [N] float64) make the most tokens per second.

        (sequences + sum of chances) / seconds is what Sequoia (Chen et al. 2024, arXiv 2402.12374) maximises over sizes
        of a tree. At most twice the largest sweep so far: costs that were never measured are approached in steps.

        A sweep over n rows takes 1 + 0.2 n seconds. One row is the end of the text; three guesses may come with it:

        >>> cost = CostModel()
        >>> for rows in (1, 4):
        ...     cost.learn_sweep(rows, seconds=1 + 0.2 * rows, waited_s=0.0)
        >>> [round(tokens / (1 + 0.2 * rows), 2) for rows, tokens in ((1, 1.0), (2, 1.8), (3, 2.3), (4, 2.4))]
        [0.83, 1.29, 1.44, 1.33]
        >>> cost.best_size(np.array([0.8, 0.5, 0.1]), rows=1, sequences=1, drafted_s=0.0)
        2
        """
        reach_N = reach_N[: max(2 * self.compute.most - rows, 0)]
        expected = sequences + np.concatenate([[0.0], np.cumsum(reach_N)])
        seconds = drafted_s + self.sweep_s(rows + np.arange(len(reach_N) + 1.0))
        return int(np.argmax(expected / seconds))

    def worth_asking(self, asked_N: Floats, reach_N: Floats, rows: int, sequences: int, drafted_s: float) -> int:
        """How many of the open nodes (their chances, best first) one more drafter pass should take; 0 is no pass.

        A node is worth asking about while its children win more than its own seconds would bring if all went on as
        until now, and the pass must win its fixed cost too; and while they may win more than a row of the sweep costs,
        such as the experts that it brings. As long as either cost is unknown, all are asked about.

        Without guesses a sweep of 1.2 s makes one token, 0.83 per second. A pass over n nodes takes 0.1 + 0.1 n seconds
        and wins half of their chances: one node 0.4 - 0.83 * 0.2 = 0.23, both 0.45 - 0.83 * 0.3 = 0.2 tokens.

        >>> cost = CostModel()
        >>> for rows in (1, 4):
        ...     cost.learn_sweep(rows, seconds=1 + 0.2 * rows, waited_s=0.0)
        ...     cost.learn_draft(rows, seconds=0.1 + 0.1 * rows, asked_reach=1.0, won_reach=0.5)
        >>> cost.worth_asking(np.array([0.8, 0.1]), np.zeros(0), rows=1, sequences=1, drafted_s=0.0)
        1
        """
        if not (self.draft.known and self.compute.known):
            return len(asked_N)
        size = self.best_size(reach_N, rows, sequences, drafted_s)
        rate = (sequences + reach_N[:size].sum()) / float(drafted_s + self.sweep_s(float(rows + size)))
        more = np.arange(1.0, size + len(asked_N) + 2)
        row_s = (self.sweep_s(rows + size + more) - self.sweep_s(float(rows + size))) / more
        asked_N = asked_N[asked_N > rate * row_s.min()]  # no child is likelier than its parent
        seconds_N = self.draft.at(np.arange(1.0, len(asked_N) + 1))
        won_N = np.append(0.0, self.gain * np.cumsum(asked_N) - rate * seconds_N)
        return int(np.argmax(won_N))
