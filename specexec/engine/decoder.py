"""The loop: guess a tree, let the target sweep over it once, keep what it agrees with. Reads like the paper.

Sequences join and leave between steps. Knows no file, no device, no terminal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from specexec.drafters.cost import CostModel
from specexec.drafters.guarded import Guarded
from specexec.drafters.protocol import Drafter
from specexec.errors import SweepCancelled
from specexec.model.exact_ties import Afresh
from specexec.model.tree_lm import Rows, Sweep
from specexec.planning.best_first import Planner
from specexec.planning.budget import AutoBudget, Budget, FixedBudget
from specexec.planning.memory_room import PLENTY, Room
from specexec.planning.overlap import Ahead, Luck
from specexec.sampling.logprobs import logprobs
from specexec.sampling.verify import Opinion, Settle, walk
from specexec.sizes import MOST_NODES, drafted, drafter_rows
from specexec.stats import Burst, Cost, Overlap, Pace
from specexec.text.sequence import Emitted, Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT, TokenTree

log = logging.getLogger(__name__)


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


class Target(Protocol):
    """The model whose text is written: sweeps over new rows of cached sequences, and a head (lm.py, chain.py)."""

    def begin(self, parts: list[Rows]) -> Sweep: ...

    def head(self, hidden_RH: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What one sweep did for one sequence."""

    sequence: Sequence
    burst: Burst


class Decoder:
    """Writes any number of sequences at once, each exactly as the target alone would."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        planner: Planner,
        budget: int | Literal["auto"],
        meter: Callable[[], Meter] = StillMeter,
        overlap: bool | None = None,
        cost: CostModel | None = None,
        afresh: Afresh | None = None,
        unwaited: Callable[[], AbstractContextManager[None]] = nullcontext,
        room: Room = PLENTY,
    ) -> None:
        self.target = target
        self.guarded = Guarded(drafter)
        self.planner = planner
        self.budget = budget
        self.live: list[Sequence] = []
        self.sweeps = 0
        self._layers_before = 0
        self.cost = cost or CostModel()
        self.pace = Pace()
        self.samples_plain = False
        self.overlapped = Overlap()
        self.overlap = overlap
        self._ahead = Ahead([])
        self._luck = Luck()
        self.afresh = afresh
        self._unwaited = unwaited
        self._auto = AutoBudget(self.cost)
        self.room = room
        self._crowded = False
        self._meter = meter
        self._stopping = threading.Event()
        self._sweeping: Sweep | None = None

    @property
    def drafter(self) -> Drafter:
        """Who guesses."""
        return self.guarded.inside

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        self.guarded = Guarded(drafter)

    def join(self, sequence: Sequence) -> None:
        """From the next step on, write this sequence too; one that has nothing to write is left alone."""
        if not self.live:
            self._stopping.clear()  # a stop that came too late for the last answer is not meant for this one
        if sequence.sampling.prompt_logprobs:
            sequence.caches.clear()  # what a cache holds is not computed, and every row of the prompt is asked for
            sequence.processed = 0
        if sequence.finish_reason is None:
            self.live.append(sequence)
            self._share_room()

    def leave(self, sequence: Sequence) -> None:
        """Stop writing this sequence; its caches hold what is committed."""
        self.live.remove(sequence)

    def stop(self) -> None:
        """End the running step after the current layer. Safe from signal handlers and other threads."""
        self._stopping.set()
        if self._sweeping is not None:
            self._sweeping.cancel()

    @property
    def layers_done(self) -> int:
        """Layers that the running sweep, or the last one, has computed. Safe from any thread."""
        return self._meter().layers_read - self._layers_before

    def step(self, kept: Items[int] = ()) -> list[Step]:
        """One sweep over the live sequences; finished ones leave. After `stop` all of them end as interrupted.

        `kept` are the lengths of texts that take memory beside them.
        """
        began, before = time.perf_counter(), self._meter()
        budget = self._share_room(kept)
        try:
            trees = self.planner.grow(self.guarded, self.live, budget, self.cost)  # guess
            guessed = time.perf_counter()
            hidden = self._sweep(trees)  # one pass over the weights, whatever the size of the trees
        except SweepCancelled:
            return self._interrupt()
        emitted = [
            self._accept(sequence, tree, hidden_RH)  # the target's own choices
            for sequence, tree, hidden_RH in zip(self.live, trees, hidden, strict=True)
        ]
        after, swept_s = self._meter(), time.perf_counter() - guessed
        rows, nodes = sum(map(len, hidden)), sum(map(len, trees))
        read_B, waited_s = after.bytes_read - before.bytes_read, after.wait_s - before.wait_s
        if self.sweeps > 1:  # the first one warms up the machine
            self.cost.learn_sweep(rows, swept_s, waited_s, prompt=rows > nodes + len(trees))
            tokens = sum(len(one.tokens) for one in emitted)
            self.cost.learn_rate(tokens if self.budget == "auto" else 0, time.perf_counter() - began)
        cost = Cost(guessed - began, swept_s, read_B, waited_s, self._ahead.seconds, self._ahead.used_s)
        share = float(self.cost.share(float(len(trees))) / self.cost.share(float(rows)))
        self.pace.learn(rows, nodes, [len(one.tokens) for one in emitted], cost, share)
        steps = [_step(*of, cost) for of in zip(self.live, trees, emitted, strict=True)]
        hits = [step.burst.hit for step in steps]
        self.overlapped += Overlap.of(cost, hits)
        self._luck.learn(hits, cost.draft_s)
        self.live = [sequence for sequence in self.live if sequence.finish_reason is None]
        return steps

    def _share_room(self, kept: Items[int] = ()) -> Budget:
        """Let every text have as many guesses as memory holds; caches give back what is beyond that."""
        most = self.room.most if self.budget == "auto" else self.budget * len(self.live)
        nodes = self.room.nodes([*(one.longest for one in self.live), *kept], most)
        for sequence in self.live:
            sequence.most_nodes = nodes
            if sequence.growth.asked > drafted(nodes):
                sequence.growth = Growth()
                for cache in sequence.caches.values():
                    cache.forget_nodes()
            for model, cache in sequence.caches.items():
                cache.give_back(sequence.longest + (nodes if model is self.target else drafter_rows(nodes)))
        if self.samples_plain and self.pace.in_doubt and not any(map(self._reads, self.live)):
            return FixedBudget(0)
        if self.budget == "auto":
            self._auto.most = min(MOST_NODES, nodes * len(self.live))
            return self._auto
        if nodes < self.budget and not self._crowded:
            self._crowded = True
            log.warning(
                "memory holds %d guesses for each of %d texts, not %d; alone they have more.",
                nodes, len(self.live), self.budget,
            )  # fmt: skip
        return FixedBudget(min(self.budget, nodes))

    def _reads(self, sequence: Sequence) -> bool:
        """Whether its next sweep reads a prompt, or what else the target has not seen."""
        return len(sequence.pending(self.target)) > 1

    def _sweep(self, trees: list[TokenTree]) -> list[Tensor]:
        """Hidden states of all new rows of each sequence, the tree's last. Guesses further ahead meanwhile."""
        if self._stopping.is_set():
            raise SweepCancelled
        rows = [self._rows(sequence, tree) for sequence, tree in zip(self.live, trees, strict=True)]
        self.sweeps += 1
        self._layers_before = self._meter().layers_read
        self._sweeping, self._ahead = None, Ahead(self.live)
        try:
            self._sweeping = self.target.begin(rows)  # the weights start to move
            if self._stopping.is_set():  # it came while the sweep was being started
                self._sweeping.cancel()
            if free_s := self._free_s(sum(len(part.tokens) for part in rows)):
                self._guess_on(self._sweeping, trees, free_s)  # nobody waits
            return self._sweeping.result()
        except BaseException:  # an interrupt reaches only this thread: the other one must not write on
            self._ahead = Ahead([])
            if self._sweeping is not None:
                self._sweeping.cancel()
                with self._unwaited():  # a layer on its way may take seconds
                    self._sweeping.wait()
            raise

    def _guess_on(self, sweep: Sweep, trees: list[TokenTree], free_s: float) -> None:
        began = time.perf_counter()
        self.planner.grow_on(
            self.guarded, self.live, trees, until=lambda: sweep.done() or time.perf_counter() - began > free_s
        )
        self._ahead.seconds = time.perf_counter() - began

    def _free_s(self, rows: int) -> float:
        """Seconds in which the sweep leaves the arithmetic idle, where that is most of it, and if guessing pays.

        Or what the caller wants. A CPU that waits a little now and then is busy reading: who guesses then, or for
        longer, takes it from the sweep.
        """
        if self.overlap is not None:
            return np.inf if self.overlap else 0.0
        cost = self.cost
        if not (cost.draft.known and (idle_s := cost.idle_s(rows)) > 0):
            return 0.0
        sweep_s = float(cost.sweep_s(rows))
        return idle_s if idle_s > max(float(cost.draft.at(1.0)), sweep_s / 2) and self._luck.pays(sweep_s) else 0.0

    def _rows(self, sequence: Sequence, tree: TokenTree) -> Rows:
        """What the target has not seen of the text, as a chain, and the tree hanging below it."""
        cache = sequence.cache(self.target)
        cache.forget_nodes()
        pending = sequence.pending(self.target)
        end = len(pending) - 1
        below = np.where(tree.parents_N == ROOT, end, tree.parents_N + len(pending))
        return Rows(cache, [*pending, *tree.tokens], [*range(-1, end), *below.tolist()])

    def _accept(self, sequence: Sequence, tree: TokenTree, hidden_RH: Tensor) -> Emitted:
        cache, pending = sequence.cache(self.target), len(sequence.pending(self.target))
        opinion = self._opinion(sequence, tree, hidden_RH[-len(tree) - 1 :])
        emitted = sequence.accept(walk(opinion, sequence.history))
        if sequence.sampling.logprobs is not None:
            emitted = self._with_logprobs(sequence, tree, emitted, hidden_RH)
        # The last token stays out of the cache: it is what the next sweep starts from.
        path = emitted.path[: len(emitted.tokens) - 1]
        cache.commit([*range(pending), *(pending + node for node in path)])
        sequence.processed = len(cache)
        kept = sequence.growth.below(emitted.tokens)
        hit = self._ahead.settle(sequence, kept)
        self.guarded.observe(sequence, tree, opinion.choices_M, kept)
        sequence.growth = Growth() if kept is None else sequence.growth.moved_on(emitted.tokens, kept, hit)
        sequence.noise.forget_before(len(sequence.tokens))
        return emitted

    def _opinion(self, sequence: Sequence, tree: TokenTree, hidden_MH: Tensor) -> Opinion:
        settle: Settle | None = None
        if (afresh := self.afresh) is not None:  # under --exact, near-ties are decided over the whole text
            text = list(sequence.tokens)

            def settle(
                node: int, scores_V: Tensor, rescore: Callable[[Tensor], Tensor], edge: Callable[[float], bool]
            ) -> Tensor:
                return afresh.settled([*text, *tree.spelled(node)], scores_V, rescore, edge)

        at, sampling, noise = len(sequence.tokens), sequence.sampling, sequence.noise
        return Opinion(self.target.head, hidden_MH, tree, at, sampling, noise, sequence.parse, settle)

    def _with_logprobs(self, sequence: Sequence, tree: TokenTree, emitted: Emitted, hidden_RH: Tensor) -> Emitted:
        head, most = self.target.head, sequence.sampling.logprobs or 0
        first = len(hidden_RH) - len(tree) - 1  # the row of the text's end; the tree's rows follow
        rows = [first, *(first + 1 + node for node in emitted.path)][: len(emitted.tokens)]
        emitted = replace(emitted, logprobs=logprobs(head, hidden_RH[rows], emitted.tokens, most))
        if sequence.sampling.prompt_logprobs and not len(sequence.cache(self.target)):
            prompt = sequence.tokens[1 : sequence.prompt_length]
            emitted = replace(emitted, prompt_logprobs=logprobs(head, hidden_RH, prompt, most))
        return emitted

    def _interrupt(self) -> list[Step]:
        self._stopping.clear()
        interrupted, self.live = self.live, []
        return [_step(one, TokenTree.empty(), one.interrupt(), Cost()) for one in interrupted]


def _step(sequence: Sequence, tree: TokenTree, emitted: Emitted, cost: Cost) -> Step:
    hit = sequence.growth.ahead if cost.ahead_s and sequence.finish_reason is None else None
    burst = Burst(
        emitted.tokens, emitted.text, sequence.finish_reason, tree, emitted.path, sequence.noise.seed, cost,
        emitted.logprobs, emitted.prompt_logprobs, hit, sequence.ended_by,
    )  # fmt: skip
    return Step(sequence, burst)
