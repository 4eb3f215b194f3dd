"""What the steps of a decoder cost, and what is learned from it: seconds, rates, and whether guessing ahead pays.

The decoder calls, in this order: `begin_step`, `end_guess`, `begin_sweep`, `end_step`, `learn_overlap`. A caller reads
`cost`, `pace`, `overlap`, `sweeps` and `layers_done` here and nowhere else. Knows no model, no drafter and no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from specexec.drafters.cost import CostModel
from specexec.planning.overlap import OverlapGain, SweepOverlap
from specexec.stats import Cost, Overlap, Pace

if TYPE_CHECKING:
    from specexec.text.sequence import Sequence


class Meter(Protocol):
    """What the weight stream has done so far (offload's StreamStats)."""

    @property
    def layers_read(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    @property
    def wait_s(self) -> float: ...


@dataclass(frozen=True)
class StillMeter:
    """Weights that do not move."""

    layers_read: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0


class StepAccounting:
    """Costs of the steps so far. `meter` reads the weight stream's counters, `clock` seconds.

    Two steps over one text; each drafts 8 guesses in 0.25 s and sweeps over them and the end of the text in 1 s:

    >>> readings = iter([0.0, 0.25, 1.25, 2.0, 2.25, 3.25, 3.25])
    >>> steps = StepAccounting(clock=readings.__next__)
    >>> for _ in range(2):
    ...     steps.begin_step()
    ...     steps.end_guess()
    ...     steps.begin_sweep([])
    ...     cost = steps.end_step(rows=9, nodes=8, tokens=[3], timed=True)
    >>> cost.draft_s, cost.sweep_s
    (0.25, 1.0)
    >>> steps.pace.alone.tokens_per_s  # 6 tokens in 2 * 1.25 s
    2.4
    >>> float(steps.cost.sweep_s(9.0)), steps.cost.rate  # of the second step alone: the first one warms up the machine
    (1.0, 2.4)
    """

    def __init__(
        self,
        meter: Callable[[], Meter] = StillMeter,
        cost: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cost = cost or CostModel()
        self.clock = clock
        self.pace = Pace()
        self.overlap = Overlap()
        self.ahead = SweepOverlap([])
        self.sweeps = 0
        self.samples_plain = False
        self._meter = meter
        self._gain = OverlapGain()
        self._layers_before = 0
        self._before: Meter = StillMeter()
        self._began_s = self._guessed_s = 0.0

    def sample_plain(self) -> None:
        """From now on some sweeps carry no guesses, where `pace` cannot decide otherwise whether guessing pays.

        They are few (after 1, 4, 16, 64, … others), write their token, and change no text.
        """
        self.samples_plain = True

    @property
    def plain_sweep_due(self) -> bool:
        """Whether the next sweep should carry no guesses, unless it reads a prompt."""
        return self.samples_plain and self.pace.in_doubt

    @property
    def layers_done(self) -> int:
        """Layers that the running sweep, or the last one, has computed. Safe from any thread."""
        return self._meter().layers_read - self._layers_before

    def begin_step(self) -> None:
        """The drafter begins."""
        self._began_s, self._before = self.clock(), self._meter()

    def end_guess(self) -> None:
        """The trees are there; the sweep over them begins."""
        self._guessed_s = self.clock()

    def begin_sweep(self, live: Items[Sequence]) -> None:
        """Weights are about to move for these texts."""
        self.sweeps += 1
        self._layers_before = self._meter().layers_read
        self.ahead = SweepOverlap(live)

    def drop_sweep(self) -> None:
        """It failed: what was guessed meanwhile is not counted."""
        self.ahead = SweepOverlap([])

    def ahead_pays_s(self, rows: int) -> float:
        """Seconds in which a sweep over `rows` rows leaves the arithmetic idle; 0 unless that is most of it, and pays.

        A CPU that waits a little from time to time is reading: a drafter that runs then, or for longer, takes those
        seconds from the sweep.
        """
        cost = self.cost
        if not (cost.draft.known and (idle_s := cost.idle_s(rows)) > 0):
            return 0.0
        sweep_s = float(cost.sweep_s(rows))
        return idle_s if idle_s > max(float(cost.draft.at(1.0)), sweep_s / 2) and self._gain.pays(sweep_s) else 0.0

    def end_step(self, rows: int, nodes: int, tokens: list[int], timed: bool) -> Cost:
        """Learn from a sweep over `rows` rows, `nodes` of them guesses, that gave each text so many `tokens`.

        `timed`: the budget is chosen by seconds, so the rate of tokens per second counts.
        """
        after, swept_s = self._meter(), self.clock() - self._guessed_s
        read_B, waited_s = after.bytes_read - self._before.bytes_read, after.wait_s - self._before.wait_s
        texts = len(tokens)
        if self.sweeps > 1:  # the first one warms up the machine
            self.cost.learn_sweep(rows, swept_s, waited_s, prompt=rows > nodes + texts)
            self.cost.learn_rate(sum(tokens) if timed else 0, self.clock() - self._began_s)
        drafted_s = self._guessed_s - self._began_s
        cost = Cost(drafted_s, swept_s, read_B, waited_s, self.ahead.seconds, self.ahead.used_s)
        share = float(self.cost.share(float(texts)) / self.cost.share(float(rows)))
        self.pace.learn(rows, nodes, tokens, cost, share)
        return cost

    def learn_overlap(self, cost: Cost, hits: Items[bool | None]) -> None:
        """Learn from a step what guessing ahead came to; `hits` of its texts are `Burst.hit`."""
        self.overlap += Overlap.of(cost, hits)
        self._gain.learn(hits, cost.draft_s)
