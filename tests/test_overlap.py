"""Guessing while the weights move: the next tree is there when the sweep returns, and a miss leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import RETRY_SWEEPS, Budget
from specexec.planning.overlap import OverlapGain
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, sequence_of

NODES = 6


class Patient:
    """Best-first, on a machine whose stream always takes longer than guessing ahead does."""

    def __init__(self) -> None:
        self.planner = BestFirst()
        self.ahead = threading.Event()

    def wait(self) -> None:
        self.ahead.wait(60)

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        self.ahead.clear()
        return self.planner.grow(drafter, live, budget, cost)

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        self.planner.grow_on(drafter, live, trees, until)
        self.ahead.set()


class Watched:
    """A drafter that counts the passes that decoding had to wait for."""

    def __init__(self, drafter: SiblingDrafter) -> None:
        self.name, self.context = drafter.name, drafter.context
        self.drafter = drafter
        self.decoder: Decoder | None = None
        self.waited_for = 0

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return self.drafter.at_hand(asks)

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        assert self.decoder is not None
        sweep = self.decoder._sweeping
        self.waited_for += sweep is None or sweep.done()
        return self.drafter.guess(asks, width)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        self.drafter.observe(sequence, tree, choices_M, kept)


class Run:
    """A target, and a drafter that knows it well or not at all."""

    def __init__(self, folder: Path, draft_seed: int, overlap: bool, planner: Patient | None = None) -> None:
        model = tiny("llama", folder / "target")
        layers = model.model.layers
        assert isinstance(layers, nn.ModuleList)
        planner = planner or Patient()
        if overlap:
            layers[0].register_forward_pre_hook(lambda *_: planner.wait())
        draft = TreeLM(tiny("llama", folder / "draft", seed=draft_seed))
        self.drafter = Watched(SiblingDrafter(draft, VOCABULARY, Ranking(tau=0.01)))
        self.decoder = Decoder(TreeLM(model), self.drafter, planner, NODES, overlap=overlap)
        self.drafter.decoder = self.decoder
        self.sequence = sequence_of(prompt(11), SamplingParams(temperature=0.9, seed=2, max_tokens=60))
        self.decoder.join(self.sequence)

    def steps(self) -> int:
        count = 0
        while self.decoder.live:
            self.decoder.step()
            count += 1
        return count

    def bursts(self) -> Iterator[tuple[Burst, bool]]:
        """What each sweep gave, and whether the next one finds a tree to start from."""
        while self.decoder.live:
            (step,) = self.decoder.step()
            yield step.burst, self.sequence.growth.started


def test_on_hits_decoding_does_not_wait_for_the_drafter(tmp_path: Path) -> None:
    serial, overlapped = Run(tmp_path / "a", 0, overlap=False), Run(tmp_path / "b", 0, overlap=True)
    assert serial.steps() >= overlapped.steps() > 5
    assert overlapped.sequence.answer == serial.sequence.answer
    assert overlapped.drafter.waited_for <= 0.3 * serial.drafter.waited_for
    # Guesses made ahead are judged like all others, when their sweep has come.
    learned = [run.drafter.drafter.calibrations["hot"].weight for run in (serial, overlapped)]
    assert learned[1] > 0.5 * learned[0] > 0


class Endless(Patient):
    """Guesses on for as long as it may; the sweep takes longer still."""

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        while not until():
            time.sleep(0.001)
        self.ahead.set()


@pytest.mark.parametrize(
    ("idle_s", "sweep_s", "guesses"),
    [(0.08, 0.1, True), (0.08, 0.2, False), (0.001, 0.0015, False), (-1.0, 0.1, False)],
)
def test_guessing_ahead_takes_no_more_than_the_idle_seconds_of_a_sweep_that_is_mostly_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_s: float, sweep_s: float, guesses: bool
) -> None:
    run = Run(tmp_path, draft_seed=0, overlap=guesses, planner=Endless())
    run.decoder.overlap = None  # where it pays
    monkeypatch.setattr(OverlapGain, "pays", lambda *_: True)
    monkeypatch.setattr(CostModel, "idle_s", lambda *_: idle_s)
    monkeypatch.setattr(CostModel, "sweep_s", lambda *_: np.asarray(sweep_s))
    for _ in range(8):
        run.decoder.accounting.cost.learn_draft(1, 0.01, 0.5, 0.5)
    ahead_s = [burst.cost.ahead_s for burst, _ in islice(run.bursts(), 4)]
    assert all(spent_s > 0.08 for spent_s in ahead_s) if guesses else not any(ahead_s)


def test_a_drafter_on_another_device_may_guess_for_as_long_as_the_sweep_takes() -> None:
    """Beside the target only for as long as that waits for weights: none of a sweep that computes all the time."""
    found = []
    for apart in (False, True):
        cost = CostModel(apart=apart)
        for rows in (1, 4):
            cost.learn_sweep(rows, seconds=1 + 0.2 * rows, waited_s=0.0)
        found.append(cost.idle_s(4))
    assert found[0] <= 0.0
    assert found[1] == pytest.approx(1.8)


def test_hits_and_hidden_drafting_are_reported(tmp_path: Path) -> None:
    knowing = Run(tmp_path / "a", draft_seed=0, overlap=True)
    *going_on, (end, _) = knowing.bursts()
    assert [burst.hit for burst, _ in going_on] == [found for _, found in going_on]
    assert end.hit is None, "nothing follows"
    told = knowing.decoder.accounting.overlap
    assert told.hits >= 3
    assert told.hits + told.misses == len(going_on)
    assert 0 < told.used_s <= told.ahead_s
    assert told.hidden == told.used_s / (told.used_s + told.draft_s)


def test_what_a_miss_drafted_ahead_counts_as_lost(tmp_path: Path) -> None:
    run = Run(tmp_path, draft_seed=5, overlap=True)
    missed = [burst.cost for burst, found in islice(run.bursts(), 5) if not found]
    assert len(missed) >= 3
    assert all(cost.ahead_s > 0 == cost.used_s for cost in missed)


def test_without_overlap_nothing_is_reported(tmp_path: Path) -> None:
    run = Run(tmp_path, draft_seed=0, overlap=False)
    assert {burst.hit for burst, _ in islice(run.bursts(), 8)} == {None}
    assert run.decoder.accounting.overlap.hit_rate is None
    assert run.decoder.accounting.overlap.hidden == 0 == run.decoder.accounting.overlap.ahead_s


def test_a_miss_leaves_no_residue(tmp_path: Path) -> None:
    run = Run(tmp_path, draft_seed=5, overlap=True)
    cache = run.sequence.cache(run.drafter.drafter.lm)
    misses = 0
    for _ in range(5):
        run.decoder.step()
        assert cache.tokens == run.sequence.tokens[: len(cache)]
        growth = run.sequence.growth
        misses += not growth.started
        # After a lucky guess: a row for the last token, and one for every node that was asked about.
        assert len(cache.parents) == (1 + growth.expanded_N.sum() if growth.started else 0)
    assert misses >= 3


def test_kept_rows_are_those_of_a_fresh_run(tmp_path: Path) -> None:
    """After a hit the drafter's cache holds text and kept nodes exactly as if it had just processed them."""
    run = Run(tmp_path, draft_seed=0, overlap=True)
    lm = run.drafter.drafter.lm
    cache = run.sequence.cache(lm)
    hits = 0
    for _ in range(6):
        run.decoder.step()
        if not run.sequence.growth.started:
            continue
        hits += 1
        chain = []
        node = ROOT
        while (node := next((i for i, parent in enumerate(cache.parents) if parent == node), ROOT)) != ROOT:
            chain.append(node)
        text = [*cache.tokens, *(cache.node_tokens[one] for one in chain)]
        assert text[: len(run.sequence.tokens)] == run.sequence.tokens
        fresh = sequence_of([*text, 0], SamplingParams()).cache(lm)
        lm.forward([Rows(fresh, text, range(-1, len(text) - 1))])
        rows = [*range(len(cache)), *(len(cache) + one for one in chain)]
        for layer, kv in fresh.layers.items():
            ours = cache.layers[layer].keys_HRD[:, rows]
            torch.testing.assert_close(ours, kv.keys_HRD[:, : len(text)], atol=1e-4, rtol=0)
    assert hits >= 3


def test_who_never_goes_where_the_text_goes_stays_at_home_but_for_a_try_now_and_then() -> None:
    luck = OverlapGain()
    luck.learn([], draft_s=0.1)
    assert luck.pays(sweep_s=1.0)
    for _ in range(20):
        luck.learn([False], draft_s=0.1)
    tried = [luck.pays(sweep_s=1.0) for _ in range(3 * RETRY_SWEEPS)]
    assert sum(tried) == 3
    for _ in range(3):
        luck.learn([True, None], draft_s=0.1)
    assert luck.pays(sweep_s=1.0)
    assert not luck.pays(sweep_s=20.0), "what it saves is nothing beside such a sweep"


def test_a_growth_seen_from_further_on_is_the_same_tree() -> None:
    growth = Growth()
    growth.add([ROOT], *table([[4, 5, 6]], [[-0.1, -1.0, -3.0]]), bar=-10.0)
    growth.add([0, 1], *table([[7, 8], [9, 4]], [[-0.2, -2.0], [-0.3, -1.5]]), bar=-10.0)
    growth.add([3, 4], *table([[1, 2], [3, 3]], [[-0.4, -1.0], [-0.5, -0.9]]), bar=-10.0)
    assert growth.below((6,)) is None  # never asked about
    assert growth.below((4, 9)) is None  # never guessed
    kept = growth.below((4,))
    assert kept is not None
    moved = growth.moved_on((4,), kept, True)
    assert moved.tree.tokens == [7, 8, 1, 2, 3, 3]
    assert moved.tree.parents == [ROOT, ROOT, 0, 0, 1, 1]
    assert moved.tree.reach_N == pytest.approx([-0.2, -2.0, -0.6, -1.2, -2.5, -2.9])
    assert moved.expanded_N.tolist() == [True, True, False, False, False, False]


def test_likely_children_without_a_chance_are_there_once_the_text_comes_to_their_parent() -> None:
    growth = Growth()
    growth.add([ROOT], *table([[4, 5]], [[-0.1, -6.0]]), bar=-10.0)
    growth.add([0, 1], *table([[7, 8], [9, 6]], [[-0.2, -5.0], [-1.0, -7.0]]), bar=-5.5)
    assert growth.tree.tokens == [4, 5, 7, 8]
    kept = growth.below((5,))
    assert kept is not None
    moved = growth.moved_on((5,), kept, False)
    assert (moved.tree.tokens, moved.tree.parents) == ([9], [ROOT])
    assert moved.tree.reach_N == pytest.approx([-1.0])


def table(tokens: list[list[int]], log_probs: list[list[float]]) -> tuple[Ints, Floats]:
    return np.array(tokens, np.int64), np.array(log_probs)
