"""One pass over the items: sweep by sweep, every result kept at once, the unfinished saved whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cli.batch.eta import Forecast, spelled
from cli.batch.items import Item
from cli.batch.partial import PartialFile
from cli.batch.sinks import Sink
from cli.errors import INTERRUPTED, SOME_FAILED
from cli.interrupts import Interrupts
from cli.quantities import format_speed
from cli.screen import Screen
from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams
from specexec.work import Failure, Request, Result

if TYPE_CHECKING:
    from cli.batch.worker import BatchEngine, Sweeps

REPORT_EVERY_S = 30.0


@dataclass
class Run:
    """What is to be done, and what has come of it so far. `earlier` were answered, `missed` failed before this run."""

    engine: BatchEngine
    sampling: SamplingParams
    sink: Sink
    screen: Screen
    parallel: int | Literal["auto"] = "auto"
    strict: bool = False
    partial: PartialFile | None = None
    begun: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    earlier: int = 0
    missed: int = 0

    def __post_init__(self) -> None:
        self.total = self.earlier + self.missed
        self.done = self.failed = self.tokens = self.sweeps = self.growing = 0
        self.unfinished: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._items: dict[int, Item] = {}
        self._to_write = 0
        self._copies: dict[int, list[Item]] = {}  # of the items that are answered: who gets the same answer
        self._forecast = Forecast(self.sampling.max_tokens)
        self._carried = sum(map(len, self.begun.values()))
        self._started_s = time.perf_counter()
        self._read_B = self.engine.progress().bytes_read

    def answer(self, items: list[Item]) -> int:
        """Answer all items and return the exit code. Ctrl-C ends after the current layer and loses nothing."""
        self.total += len(items)
        self._items = {item.index: item for item in items}
        self._copies = _copies(items)
        self._to_write = len(self._copies)
        self.unfinished = {item.id: (item.prompt_sha, self.begun[item.id]) for item in items if item.id in self.begun}
        for item in items:
            if item.problem is not None:
                self._fail(item, item.problem)
        batch = self.engine.batch(self._requests(), self.parallel)
        with Interrupts(self.engine.stop, lambda: self.screen.tell("stopping…")) as interrupts:
            try:
                with self.screen.status(self.progress, plain_every_s=REPORT_EVERY_S):
                    while not batch.done and not interrupts.exit_code:
                        self._sweep(batch)
                        self.screen.progress(self._ended / max(self.total, 1))
            except KeyboardInterrupt:
                return INTERRUPTED
            finally:
                self.screen.progress(None)
                self._remember(batch)
                batch.close()
                if self.partial is not None:
                    self.partial.save(self.unfinished)
        return interrupts.exit_code or (SOME_FAILED if self.failed + self.missed else 0)

    def _requests(self) -> Iterator[Request]:
        for index in self._copies:
            item = self._items[index]
            yield Request(index, item.prompt, item.sampling(self.sampling), self.begun.get(item.id, ()))

    def _sweep(self, batch: Sweeps) -> None:
        for result in batch.sweep():
            self._take(result)
        self.sweeps = batch.sweeps
        self.growing = sum(len(partial.tokens) for partial in batch.partial)
        if self.partial is not None and self.partial.due():
            self._remember(batch)
            self.partial.save(self.unfinished)

    def _remember(self, batch: Sweeps) -> None:
        for partial in batch.partial:
            item = self._items[partial.index]
            if partial.tokens:
                self.unfinished[item.id] = (item.prompt_sha, partial.tokens)

    def _take(self, result: Result) -> None:
        item = self._items[result.index]
        if isinstance(result, Failure):
            self._to_write -= 1
            for one in [item, *self._copies[item.index]]:
                self._fail(one, result.error)
            return
        if result.finish_reason == "interrupted":
            if result.tokens:
                self.unfinished[item.id] = (item.prompt_sha, result.tokens)
                if not self.sink.keeps_partial:
                    self.sink.finished(item, result)
        else:
            self.sink.finished(item, result)
            for copy in self._copies[item.index]:
                self.sink.finished(copy, replace(result, sweeps=0, bytes_read=0, seconds=0.0))
            self.unfinished.pop(item.id, None)
            self._to_write -= 1
            self.done += 1 + len(self._copies[item.index])
            self._forecast.learn(len(result.tokens))
        self.tokens += len(result.tokens)

    def _fail(self, item: Item, error: SpecexecError) -> None:
        if self.strict:
            raise error
        self.failed += 1
        self.unfinished.pop(item.id, None)
        self.screen.tell(f"{item.id}: {error.what}" if item.id not in error.what else error.what)
        self.sink.failed(item, error)

    def progress(self) -> str:
        """Where the run is: items as a bar, then the layer under way, the speed so far, and what is still to come."""
        from tqdm import tqdm

        now = self.engine.progress()
        spent_s = time.perf_counter() - self._started_s
        layer = f"layer {now.layer}/{now.layers} · " if now.layers else ""  # a cluster is at many at a time
        facts = f"{layer}{self._speed(spent_s)}{self._wire(now.bytes_read, spent_s)}"
        rate = self._new_tokens / max(spent_s, 1e-9)
        left = self._forecast.left_s(self._to_write, self.growing, rate)
        facts += f" · ETA {spelled(left)}" if left and self.total > self._ended else ""
        bar = "{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt} items · " + facts
        return tqdm.format_meter(self._ended, self.total, spent_s, bar_format=bar)

    @property
    def _ended(self) -> int:
        return self.earlier + self.missed + self.done + self.failed

    def summary(self) -> str:
        """What came of it."""
        answered, failed = self.earlier + self.done, self.missed + self.failed
        counts = {"answered": answered, "in part": len(self.unfinished), "failed": failed}
        facts = [f"{count} {what}" for what, count in counts.items() if count or what == "answered"]
        left = self.total - sum(counts.values())
        facts += [f"{left} not begun"] if left else []
        spent_s = time.perf_counter() - self._started_s
        facts.append(self._speed(spent_s) + self._wire(self.engine.progress().bytes_read, spent_s))
        return " · ".join(facts + ([f"seed {self.sampling.seed}"] if self.sampling.temperature != 0 else []))

    @property
    def _new_tokens(self) -> int:
        return max(self.tokens + self.growing - self._carried, 0)

    def _speed(self, spent_s: float) -> str:
        new = self._new_tokens
        return f"{new} tokens · {new / max(spent_s, 1e-9):.1f} tok/s · {new / max(self.sweeps, 1):.1f} tok/sweep"

    def _wire(self, read_B: int, spent_s: float) -> str:
        moved_B = read_B - self._read_B
        return f" · {format_speed(moved_B / spent_s)}" if moved_B > 0 else ""


def _copies(items: list[Item]) -> dict[int, list[Item]]:
    """By the index of each item that has to be answered, the others that its answer serves."""
    leaders: dict[str, int] = {}
    copies: dict[int, list[Item]] = {}
    for item in items:
        if item.problem is None:
            leader = leaders.setdefault(item.duplicate_of or item.id, item.index)
            copies.setdefault(leader, []).extend([item] if leader != item.index else [])
    return copies
