"""The loop: guess a tree, let the target sweep over it once, keep what it agrees with. Reads like the paper.

Sequences join and leave between steps. Knows no file, no device, no terminal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from specexec.drafters.guarded import Guarded
from specexec.drafters.protocol import Drafter
from specexec.engine.guess_limit import GuessLimit
from specexec.engine.step_accounting import StepAccounting
from specexec.errors import SweepCancelled
from specexec.model.exact_ties import ExactTies
from specexec.model.tree_lm import Rows, Sweep
from specexec.planning.best_first import Planner
from specexec.planning.budget import FixedBudget
from specexec.planning.memory_room import PLENTY, Room
from specexec.sampling.logprobs import logprobs
from specexec.sampling.processors import History
from specexec.sampling.shared_head import logits_of_texts
from specexec.sampling.verify import Acceptance, Opinion, Settle, walk
from specexec.stats import Burst, Cost
from specexec.text.sequence import Emitted, Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT, TokenTree


class Target(Protocol):
    """The model whose text is written: sweeps over new rows of cached sequences, and a head."""

    def begin(self, parts: list[Rows]) -> Sweep: ...

    def head(self, hidden_RH: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What one sweep did for one sequence."""

    sequence: Sequence
    burst: Burst


def whole(sequence: Sequence) -> list[int]:
    """All of its prompt keeps its keys and values."""
    return []


class Decoder:
    """Writes any number of sequences at once, each exactly as the target alone would."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        planner: Planner,
        budget: int | Literal["auto"],
        accounting: StepAccounting | None = None,
        overlap: bool | None = None,
        exact_ties: ExactTies | None = None,
        unwaited: Callable[[], AbstractContextManager[None]] = nullcontext,
        room: Room = PLENTY,
        walk: Callable[[Opinion, History], Acceptance] = walk,
        thin: Callable[[Sequence], list[int]] = whole,
    ) -> None:
        self.target = target
        self.guarded = Guarded(drafter)
        self.planner = planner
        self.accounting = accounting or StepAccounting()
        self.limit = GuessLimit(budget, room, self.accounting.cost, target)
        self.live: list[Sequence] = []
        self.overlap = overlap
        self.exact_ties = exact_ties
        self._unwaited = unwaited
        self._walk, self._thin = walk, thin
        self._stopping = threading.Event()
        self._sweeping: Sweep | None = None

    @property
    def drafter(self) -> Drafter:
        """What guesses."""
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
            self.limit.share(self.live)

    def leave(self, sequence: Sequence) -> None:
        """Stop writing this sequence; its caches hold what is committed."""
        self.live.remove(sequence)

    def stop(self) -> None:
        """End the running step after the current layer. Safe from signal handlers and other threads."""
        self._stopping.set()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def step(self, kept: Items[int] = ()) -> list[Step]:
        """One sweep over the live sequences; finished ones leave. After `stop` all of them end as interrupted.

        `kept` are the lengths of texts that take memory beside them.
        """
        try:
            trees = self._guess(kept)
            hidden = self._sweep(trees)  # one pass over the weights, whatever the size of the trees
        except SweepCancelled:
            return self._interrupt()
        judged = [rows_RH[-len(tree) - 1 :] for tree, rows_RH in zip(trees, hidden, strict=True)]
        logits = logits_of_texts(self.target.head, judged)
        emitted = [self._accept(*of) for of in zip(self.live, trees, hidden, logits, strict=True)]  # the target's own
        return self._end_step(trees, hidden, emitted)

    def _guess(self, kept: Items[int]) -> list[TokenTree]:
        """A tree of guesses for every live text."""
        self.accounting.begin_step()
        budget = self.limit.share(self.live, kept)
        if self.accounting.plain_sweep_due and not any(map(self._reads, self.live)):
            budget = FixedBudget(0)
        for one in self.live:
            if one.kept is None:
                one.kept = [] if one.cache(self.target).thinned else self._thin(one)
        trees = self.planner.grow(self.guarded, self.live, budget, self.accounting.cost)
        self.accounting.end_guess()
        # What hangs below a prompt in the sweep that reads it would see more of it than what is written later.
        return [TokenTree.empty() if one.kept else tree for one, tree in zip(self.live, trees, strict=True)]

    def _end_step(self, trees: list[TokenTree], hidden: list[Tensor], emitted: list[Emitted]) -> list[Step]:
        rows, nodes, timed = sum(map(len, hidden)), sum(map(len, trees)), self.limit.budget == "auto"
        cost = self.accounting.end_step(rows, nodes, [len(one.tokens) for one in emitted], timed)
        steps = [_step(*of, cost) for of in zip(self.live, trees, emitted, strict=True)]
        self.accounting.learn_overlap(cost, [step.burst.hit for step in steps])
        self.live = [sequence for sequence in self.live if sequence.finish_reason is None]
        return steps

    def _reads(self, sequence: Sequence) -> bool:
        """Whether its next sweep reads a prompt, or what else the target has not seen."""
        return len(sequence.pending(self.target)) > 1

    def _sweep(self, trees: list[TokenTree]) -> list[Tensor]:
        """Hidden states of all new rows of each sequence, the tree's last. Guesses further ahead meanwhile."""
        if self._stopping.is_set():
            raise SweepCancelled
        rows = [self._rows(sequence, tree) for sequence, tree in zip(self.live, trees, strict=True)]
        self._sweeping = None
        self.accounting.begin_sweep(self.live)
        try:
            self._sweeping = self.target.begin(rows)  # the weights start to move
            if self._stopping.is_set():  # it came while the sweep was being started
                self._sweeping.cancel()
            if free_s := self._ahead_s(sum(len(part.tokens) for part in rows)):
                self._guess_ahead(self._sweeping, trees, free_s)
            return self._sweeping.result()
        except BaseException:  # an interrupt reaches only this thread: the other one must not write on
            self.accounting.drop_sweep()
            if self._sweeping is not None:
                self._sweeping.cancel()
                with self._unwaited():  # a layer on its way may take seconds
                    self._sweeping.wait()
            raise

    def _guess_ahead(self, sweep: Sweep, trees: list[TokenTree], most_s: float) -> None:
        """Guess below the likeliest exits of `trees` until the sweep is over, or for `most_s` seconds."""
        clock = self.accounting.clock
        began_s = clock()
        self.planner.grow_on(self.guarded, self.live, trees, until=lambda: sweep.done() or clock() - began_s > most_s)
        self.accounting.ahead.seconds = clock() - began_s

    def _ahead_s(self, rows: int) -> float:
        """Seconds to guess ahead in while a sweep over `rows` rows streams: what `overlap` asks for, or what pays."""
        if self.overlap is None:
            return self.accounting.ahead_pays_s(rows)
        return np.inf if self.overlap else 0.0

    def _rows(self, sequence: Sequence, tree: TokenTree) -> Rows:
        """What the target has not seen of the text, as a chain, and the tree hanging below it."""
        cache = sequence.cache(self.target)
        cache.forget_nodes()
        pending = sequence.pending(self.target)
        end = len(pending) - 1
        below = np.where(tree.parents_N == ROOT, end, tree.parents_N + len(pending))
        return Rows(cache, [*pending, *tree.tokens], [*range(-1, end), *below.tolist()], len(pending))

    def _accept(self, sequence: Sequence, tree: TokenTree, hidden_RH: Tensor, logits_MV: Tensor | None) -> Emitted:
        cache, pending = sequence.cache(self.target), len(sequence.pending(self.target))
        opinion = self._opinion(sequence, tree, hidden_RH[-len(tree) - 1 :], logits_MV)
        emitted = sequence.accept(self._walk(opinion, sequence.history))
        if sequence.sampling.logprobs is not None:
            emitted = self._with_logprobs(sequence, tree, emitted, hidden_RH)
        # The last token stays out of the cache: it is what the next sweep starts from.
        path = emitted.path[: len(emitted.tokens) - 1]
        cache.commit([*range(pending), *(pending + node for node in path)])
        if sequence.kept:
            cache.thin(sequence.kept, sequence.prompt_length)
            sequence.kept = []
        sequence.processed, sequence.kv_dropped = len(cache), cache.dropped
        kept = sequence.growth.below(emitted.tokens)
        hit = self.accounting.ahead.settle(sequence, kept)
        self.guarded.observe(sequence, tree, opinion.choices_M, kept)
        sequence.growth = Growth() if kept is None else sequence.growth.moved_on(emitted.tokens, kept, hit)
        sequence.noise.forget_before(len(sequence.tokens))
        return emitted

    def _opinion(self, sequence: Sequence, tree: TokenTree, hidden_MH: Tensor, logits_MV: Tensor | None) -> Opinion:
        settle: Settle | None = None
        if (ties := self.exact_ties) is not None:  # under --exact, near-ties are decided over the whole text
            text = list(sequence.tokens)

            def settle(
                node: int, scores_V: Tensor, rescore: Callable[[Tensor], Tensor], edge: Callable[[float], bool]
            ) -> Tensor:
                return ties.settled([*text, *tree.spelled(node)], sequence.prompt_length, scores_V, rescore, edge)

        at, sampling, noise = len(sequence.tokens), sequence.sampling, sequence.noise
        return Opinion(self.target.head, hidden_MH, tree, at, sampling, noise, sequence.parse, settle, logits_MV)

    def _with_logprobs(self, sequence: Sequence, tree: TokenTree, emitted: Emitted, hidden_RH: Tensor) -> Emitted:
        head, most = self.target.head, sequence.sampling.logprobs or 0
        first = len(hidden_RH) - len(tree) - 1  # the row of the text's end; the tree's rows follow
        rows = [first, *(first + 1 + node for node in emitted.path)][: len(emitted.tokens)]
        emitted = replace(emitted, logprobs=logprobs(head, hidden_RH[rows], emitted.tokens, most))
        if sequence.sampling.prompt_logprobs and not len(sequence.cache(self.target)):
            prompt = sequence.words(1)[: sequence.prompt_length - 1]
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
        emitted.logprobs, emitted.prompt_logprobs, hit, sequence.ended_by, stop_text=sequence.stopped_by,
        replaced=emitted.replaced, unread=sequence.unread, kv_dropped=sequence.kv_dropped,
    )  # fmt: skip
    return Step(sequence, burst)
