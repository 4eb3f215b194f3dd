"""One pass over the items: sweep by sweep, every result kept at once, the unfinished saved whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from cli.batch.eta import TimeLeft, spelled
from cli.batch.input.items import Item
from cli.batch.output.answers import ItemAnswer
from cli.batch.output.partial import Begun, PartialFile
from cli.batch.output.sinks import Sink
from cli.shared.errors import INTERRUPTED, SOME_FAILED
from cli.shared.quantities import format_speed
from cli.terminal.interrupts import Interrupts
from cli.terminal.screen import Screen
from specexec.engine.request_types import Failure, Request, Result
from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion

if TYPE_CHECKING:
    from cli.batch.worker import BatchEngine, Sweeps

REPORT_EVERY_S = 30.0


class Prepares(Protocol):
    """From an item to requests, and from finished texts to its answer (preparation.py)."""

    def requests(self, item: Item, run: SamplingParams) -> list[Request]: ...

    def answer(self, item: Item, run: SamplingParams, completions: Mapping[int, Completion]) -> ItemAnswer: ...


@dataclass
class Run:
    """What is to be done, and what has come of it so far. `earlier` were answered, `missed` failed before this run."""

    engine: BatchEngine
    preparation: Prepares
    sampling: SamplingParams
    sink: Sink
    screen: Screen
    parallel: int | Literal["auto"] = "auto"
    strict: bool = False
    partial: PartialFile | None = None
    begun: Mapping[str, Begun] = field(default_factory=dict)
    earlier: int = 0
    missed: int = 0

    def __post_init__(self) -> None:
        self.total = self.earlier + self.missed
        self.done = self.failed = self.tokens = self.sweeps = self.growing = 0
        self.unfinished: dict[str, tuple[str, Begun]] = {}
        self._texts: list[tuple[Item, int]] = []  # by the index of a request: whose text it is, and which of them
        self._open: dict[str, dict[int, Completion]] = {}  # of items that are being answered: the texts that ended
        self._to_write = 0  # texts
        self._copies: dict[str, list[Item]] = {}  # of the items that are answered: who gets the same answer
        self._forecast = TimeLeft(self.sampling.max_tokens)
        self._carried = sum(len(text) for texts in self.begun.values() for text in texts)
        self._started_s = time.perf_counter()
        self._read_B = self.engine.progress().bytes_read

    def answer(self, items: list[Item]) -> int:
        """Answer all items and return the exit code. Ctrl-C ends after the current layer and loses nothing."""
        self.total += len(items)
        self._copies = _copies(items)
        leaders = [item for item in items if item.id in self._copies]
        self._to_write = sum(item.count for item in leaders)
        self.unfinished = {item.id: (item.prompt_sha, self.begun[item.id]) for item in items if item.id in self.begun}
        for item in items:
            if item.problem is not None:
                self._fail(item, item.problem)
        batch = self.engine.batch(self._requests(leaders), self.parallel)
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
                self._show_unfinished(leaders)
                if self.partial is not None:
                    self.partial.save(self.unfinished)
        return interrupts.exit_code or (SOME_FAILED if self.failed + self.missed else 0)

    def _requests(self, items: list[Item]) -> Iterator[Request]:
        """Every text of every item, made when there is a place for it."""
        for item in items:
            try:
                requests = self.preparation.requests(item, self.sampling)
            except SpecexecError as error:
                self._give_up(item, error)
                continue
            self._open[item.id] = {}
            for number, request in enumerate(requests):
                if item.id not in self._open:
                    break  # another text of it has failed
                self._texts.append((item, number))
                yield replace(request, index=len(self._texts) - 1, written=self._written(item, number))

    def _written(self, item: Item, number: int) -> tuple[int, ...]:
        """What an earlier run has written; none where log-probabilities are wanted: those take computing it again."""
        texts = self.begun.get(item.id)
        return () if texts is None or item.sampling(self.sampling).logprobs is not None else texts[number]

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
            self._keep(*self._texts[partial.index], partial.tokens)

    def _keep(self, item: Item, number: int, tokens: tuple[int, ...]) -> None:
        """Note how far one text of an unfinished item is."""
        if tokens and item.id in self._open:
            _, texts = self.unfinished.get(item.id, ("", ((),) * item.count))
            self.unfinished[item.id] = (item.prompt_sha, (*texts[:number], tokens, *texts[number + 1 :]))

    def _take(self, result: Result) -> None:
        item, number = self._texts[result.index]
        texts = self._open.get(item.id)
        if texts is None:
            return
        if isinstance(result, Failure):
            self._give_up(item, result.error)
            return
        texts[number] = result
        self.tokens += len(result.tokens)
        self._keep(item, number, result.tokens)
        if result.finish_reason == "interrupted":
            return
        self._to_write -= 1
        self._forecast.learn(len(result.tokens))
        if len(texts) == item.count and all(one.finish_reason != "interrupted" for one in texts.values()):
            self._finish(item)

    def _finish(self, item: Item) -> None:
        answer = self._answer(item)
        self.sink.finished(item, answer)
        for copy in self._copies[item.id]:
            self.sink.finished(copy, answer.free())
        self.unfinished.pop(item.id, None)
        self.done += 1 + len(self._copies[item.id])

    def _answer(self, item: Item) -> ItemAnswer:
        """What there is of it."""
        texts = self._open.pop(item.id)
        return self.preparation.answer(item, self.sampling, {number: texts[number] for number in sorted(texts)})

    def _show_unfinished(self, items: list[Item]) -> None:
        """What was written of an answer that will not go on is all there will be of it."""
        if not self.sink.keeps_partial:
            for item in items:
                if any(one.tokens for one in self._open.get(item.id, {}).values()):
                    self.sink.finished(item, self._answer(item))

    def _give_up(self, item: Item, error: SpecexecError) -> None:
        """An item that cannot be answered; equal items get the same refusal."""
        self._to_write -= item.count - len(self._open.pop(item.id, {}))
        for one in [item, *self._copies[item.id]]:
            self._fail(one, error)

    def _fail(self, item: Item, error: SpecexecError) -> None:
        if self.strict:
            raise error
        self.failed += 1
        self.unfinished.pop(item.id, None)
        self.screen.tell(f"{item.id}: {error.what}" if item.id not in error.what else error.what)
        self.sink.failed(item, error)

    def progress(self) -> str:
        """Where the run is: items, as a bar too where lines are live, the layer under way, speed, time left."""
        from tqdm import tqdm

        now = self.engine.progress()
        spent_s = time.perf_counter() - self._started_s
        layer = f"layer {now.layer}/{now.layers} · " if now.layers else ""  # a cluster is at many at a time
        facts = f"{layer}{self._speed(spent_s)}{self._wire(now.bytes_read, spent_s)}"
        rate = self._new_tokens / max(spent_s, 1e-9)
        left = self._forecast.left_s(self._to_write, self.growing, rate)
        facts += f" · ETA {spelled(left)}" if left and self.total > self._ended else ""
        drawn = " |{bar:10}|" if self.screen.live else ","
        bar = "{percentage:3.0f}%" + drawn + " {n_fmt}/{total_fmt} items · " + facts
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


def _copies(items: list[Item]) -> dict[str, list[Item]]:
    """By the id of each item that has to be answered, the others that its answer serves."""
    leaders: dict[str, str] = {}
    copies: dict[str, list[Item]] = {}
    for item in items:
        if item.problem is None:
            leader = leaders.setdefault(item.duplicate_of or item.id, item.id)
            copies.setdefault(leader, []).extend([item] if leader != item.id else [])
    return copies
