"""`--drafter auto` takes the fastest of what fits and says why; a model that is not worth its time may rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest

import specexec
from cli.engine.open import losing
from offload import ModelPair, open_folder, resolve
from offload.checkpoint.quantized.quantize import Quant
from offload.packs.pack import pack, plan
from specexec.compose.auto_choice import candidates, fastest
from specexec.compose.earlier_runs import EarlierRuns
from specexec.compose.memory_plan import MemoryPlan
from specexec.drafters.auto import ENOUGH, Auto
from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.registry import DrafterChoice
from specexec.drafters.union import Union
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.planning.baselines import NAMES, planner_of
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.stats import Cost, Pace
from specexec.text.sequence import Sequence
from specexec.tree.tree import Ints, TokenTree
from tests.fake_engine import FakeEngine
from tests.writing import TargetAndDrafters, plain_texts, prompt, sequence_of

SIBLING, COPY, ALONE = (DrafterChoice((*first, "ngram"), auto=True) for first in (("sibling",), ("substitute",), ()))


def test_what_does_not_fit_is_no_candidate() -> None:
    everything = {SIBLING: "disk", COPY: "disk", ALONE: "disk"}
    assert candidates(True, everything.get, copies=True) == [SIBLING, COPY, ALONE]
    assert candidates(False, everything.get, copies=True) == [COPY, ALONE]
    assert candidates(True, everything.get, copies=False) == [SIBLING, ALONE]
    assert candidates(True, {COPY: "disk", ALONE: "disk"}.get, copies=True) == [COPY, ALONE]
    assert candidates(True, lambda _: None, copies=True) == [ALONE]
    resident = {SIBLING: "none", COPY: "none", ALONE: "none"}
    assert candidates(True, resident.get, copies=True) == [SIBLING, ALONE]


@pytest.mark.parametrize(
    ("found", "measured", "best", "why"),
    [
        ([SIBLING, COPY, ALONE], {}, SIBLING, "the paired model"),
        ([SIBLING, COPY, ALONE], {"substitute+ngram": 9.0}, SIBLING, "the paired model"),
        ([SIBLING, COPY, ALONE], {"substitute+ngram": 9.0, "sibling+ngram": 3.0}, COPY, "substitute+ngram 9"),
        ([SIBLING, COPY, ALONE], {"substitute+ngram": 2.0, "sibling+ngram": 3.0}, SIBLING, "sibling+ngram 3"),
        ([SIBLING, COPY, ALONE], {"sibling+ngram": 3.0, "ngram": 1.0}, SIBLING, "not measured: substitute+ngram"),
        ([SIBLING, ALONE], {"substitute+ngram": 9.0, "sibling+ngram": 3.0}, SIBLING, "the paired model"),
        ([COPY, ALONE], {}, COPY, "a 4-bit copy"),
        ([ALONE], {"ngram": 1.0}, ALONE, "does not fit beside it"),
    ],
)
def test_the_fastest_is_taken_once_it_is_known(
    found: list[DrafterChoice], measured: dict[str, float], best: DrafterChoice, why: str
) -> None:
    choice, reason = fastest(found, paired=True, measured=measured)
    assert choice == best
    assert why in reason


def test_auto_follows_what_was_measured_and_the_memory_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def beside(_: object, choice: DrafterChoice) -> MemoryPlan:
        return MemoryPlan({"drafter": 10**15 * ("sibling" in choice.sources)}, {}, 0, {})

    with specexec.load("demo", offload="none", earlier=EarlierRuns({"sibling+ngram": 2.0, "ngram": 5.0})) as llm:
        assert llm.sources == "ngram"
        assert "ngram 5" in llm.reason
    monkeypatch.setattr("specexec.compose.memory_plan.memory_plan", beside)
    with specexec.load("demo", offload="none") as llm:
        assert llm.sources == "ngram"
        assert "does not fit" in llm.reason


def test_an_explicit_choice_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with specexec.load(
        "demo", drafter="sibling", offload="none", earlier=EarlierRuns({"sibling": 1.0, "ngram": 5.0})
    ) as llm:
        assert (llm.sources, llm.reason) == ("sibling", "")
    alone = ModelPair("lonely", resolve("demo").target)
    monkeypatch.setattr("offload.resolve", lambda *_, **__: alone, raising=False)
    with pytest.raises(BadDrafter, match="no drafter is paired with 'lonely'"):
        specexec.load("lonely", drafter="sibling", offline=True)
    with specexec.load("lonely", offload="none", offline=True) as llm:
        assert llm.sources == "ngram"
        assert "no drafter is paired" in llm.reason


@pytest.mark.parametrize(("quant", "taken"), [("int8", "substitute+ngram"), ("nf4", "ngram")])
def test_a_copy_in_four_bits_is_for_what_streams_in_more(quant: Quant, taken: str, tmp_path: Path) -> None:
    pack(plan(open_folder(resolve("demo").target), quant), tmp_path / "pack")
    earlier = EarlierRuns({"substitute+ngram": 9.0, "ngram": 1.0})
    with specexec.load(str(tmp_path / "pack"), offload="disk", budget=4, earlier=earlier) as llm:
        assert llm.sources == taken


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow:
    """A drafter that takes `seconds` for every answer."""

    def __init__(self, drafter: Drafter, clock: Clock, seconds: float) -> None:
        self.name, self.context = drafter.name, drafter.context
        self._drafter, self._clock, self._seconds = drafter, clock, seconds
        self.asked = 0

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return self._drafter.at_hand(asks)

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        self.asked += 1
        self._clock.now += self._seconds
        return self._drafter.guess(asks, width)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        self._drafter.observe(sequence, tree, choices_M, kept)


@pytest.mark.parametrize(("seconds", "rests"), [(1.0, True), (0.0001, False)])
def test_a_model_that_takes_longer_than_it_saves_rests(
    seconds: float, rests: bool, llama: TargetAndDrafters, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, cost = Clock(), CostModel()
    monkeypatch.setattr("specexec.drafters.union.time", clock)
    for rows in range(1, 40):
        cost.learn_sweep(rows, 0.1, 0.0)
    target, some = llama.target, llama.drafters
    model = Slow(some["sibling"], clock, seconds)
    auto = Auto(Union([model, some["confident"]]), cost)
    sampling = SamplingParams(temperature=0.9, seed=4, max_tokens=90)
    monkeypatch.setattr("specexec.drafters.auto.REST", 12)
    (plain,) = plain_texts(target, [prompt(12)], sampling)
    decoder, sequence = (
        Decoder(target, auto, BestFirst(width=4, depth=2), 2, overlap=False),
        sequence_of(prompt(12), sampling),
    )
    decoder.join(sequence)
    resting: list[bool] = []
    while decoder.live:
        before = model.asked
        decoder.step()
        resting.append(model.asked == before)
    assert sequence.answer == plain
    assert any(resting[ENOUGH : ENOUGH + 10]) == rests
    if rests:
        assert 0.2 < sum(resting) / len(resting) < 0.7, "it is tried again"
        assert not all(resting[ENOUGH + 14 :])


@pytest.mark.parametrize("texts", [1, 4])
def test_it_says_when_guessing_surely_lost_though_no_sweep_was_plain(texts: int) -> None:
    # A sweep without guesses is no longer than one with them, so plain decoding would have made a token in 0.2 s.
    engine = FakeEngine()
    engine.toy = False
    for _ in range(12):
        engine.accounting.pace.learn(texts * 513, texts * 512, [1] * texts, Cost(draft_s=0.3, sweep_s=0.2))
    assert "at least 2.5 times as fast" in str(losing(engine))  # type: ignore[arg-type]  # a fake
    for _ in range(12):
        engine.accounting.pace.learn(texts * 513, texts * 512, [5] * texts, Cost(draft_s=0.3, sweep_s=0.2))
    assert losing(engine) is None  # type: ignore[arg-type]  # a fake


def test_a_sure_loss_is_reported_though_a_single_plain_sweep_leaves_it_open() -> None:
    engine = FakeEngine()
    engine.toy = False
    engine.accounting.pace.learn(1, 0, [1], Cost(sweep_s=1.0))
    for _ in range(12):
        engine.accounting.pace.learn(513, 512, [1], Cost(draft_s=0.05, sweep_s=1.0))
    assert "at least 1" in str(losing(engine))  # type: ignore[arg-type]  # a fake


def test_it_says_when_guessing_lost_against_an_earlier_run() -> None:
    """Every sweep carried guesses, and took longer for them: only a plain run can tell."""
    engine = FakeEngine()
    engine.toy = False
    for _ in range(12):
        engine.accounting.pace.learn(513, 512, [3], Cost(draft_s=0.1, sweep_s=0.9))
    assert losing(engine) is None  # type: ignore[arg-type]  # a fake
    told = str(losing(engine, plain_before=4.0))  # type: ignore[arg-type]  # a fake
    assert "made 3 tokens/s" in told
    assert "made 4 in earlier runs" in told
    assert losing(engine, plain_before=3.2) is None  # type: ignore[arg-type]  # a fake
    engine.accounting.pace = Pace()
    for _ in range(12):  # several texts at a time are not compared with one
        engine.accounting.pace.learn(4 * 513, 4 * 512, [3] * 4, Cost(draft_s=0.1, sweep_s=0.9))
    assert losing(engine, plain_before=4.0) is None  # type: ignore[arg-type]  # a fake


def test_it_says_when_guessing_lost() -> None:
    engine = FakeEngine()
    engine.toy = False
    for _ in range(6):
        engine.accounting.pace.learn(1, 0, [1], Cost(sweep_s=0.1))
        engine.accounting.pace.learn(9, 8, [1], Cost(draft_s=0.1, sweep_s=0.2))
    assert "--drafter none is faster" in str(losing(engine))  # type: ignore[arg-type]  # a fake
    engine.accounting.pace = Pace()
    for _ in range(6):
        engine.accounting.pace.learn(9, 8, [5], Cost(draft_s=0.1, sweep_s=0.1))
        engine.accounting.pace.learn(1, 0, [1], Cost(sweep_s=0.1))
    assert losing(engine) is None  # type: ignore[arg-type]  # a fake


def test_it_says_when_too_many_guesses_lengthened_the_sweeps_of_several_texts() -> None:
    """Nothing bounds what three sweeps would have taken without their guesses; a fourth one shows it."""
    engine = FakeEngine()
    engine.toy, engine.budget = False, 2048
    for tokens in ([7, 8], [9, 6], [8, 8]):
        engine.accounting.pace.learn(2 + 4096, 4096, tokens, Cost(draft_s=0.2, sweep_s=1.0))
    assert losing(engine) is None  # type: ignore[arg-type]  # a fake
    assert engine.accounting.pace.in_doubt
    engine.accounting.pace.learn(2, 0, [1, 1], Cost(sweep_s=0.03))
    told = str(losing(engine))  # type: ignore[arg-type]  # a fake
    assert "made 13.2 tokens/s, plain decoding about 66.7" in told
    assert "--budget auto guesses as much as pays" in told


@pytest.mark.parametrize(
    ("tokens", "cost", "share", "doubt"),
    [
        (3, Cost(draft_s=0.1, sweep_s=1.0), 1.0, True),  # no wait: all of it may have been the guesses' arithmetic
        (3, Cost(draft_s=0.1, sweep_s=1.0, wait_s=0.5), 1.0, False),  # 0.5 s a token at best: 2.2 in 1.1 s
        (2, Cost(draft_s=0.1, sweep_s=1.0, wait_s=0.5), 1.0, True),
        (3, Cost(draft_s=0.1, sweep_s=1.0, wait_s=0.5), 0.25, True),  # one token visits a quarter of the experts
        (1, Cost(draft_s=0.1, sweep_s=1.0), 1.0, False),  # a token in 1.1 s, where plain decoding takes at most 1
    ],
)
def test_a_plain_sweep_is_made_only_where_bounds_leave_a_doubt(
    tokens: int, cost: Cost, share: float, doubt: bool
) -> None:
    pace = Pace()
    for _ in range(3):
        pace.learn(65, 64, [tokens], cost, share)
    assert pace.in_doubt == doubt


@pytest.mark.parametrize("budget", [32, "auto"])
@pytest.mark.parametrize("planner", NAMES)
def test_few_sweeps_are_plain_and_change_no_text(
    budget: int | Literal["auto"], planner: str, llama: TargetAndDrafters
) -> None:
    target, some = llama.target, llama.drafters
    sampling = SamplingParams(temperature=0.9, seed=4, max_tokens=32)
    texts = [prompt(12), prompt(7, seed=3)]
    decoder = Decoder(target, some["useless"], planner_of(planner), budget, overlap=False)
    decoder.accounting.sample_plain()
    sequences = [sequence_of(tokens, sampling) for tokens in texts]
    carried: list[list[int]] = []
    for sequence in sequences:
        decoder.join(sequence)
    while decoder.live:
        pace = decoder.accounting.pace
        pace.at_least, pace.at_most = 0.0, math.inf  # seconds of a busy machine decide nothing here
        carried.append([step.burst.nodes for step in decoder.step()])
    assert [sequence.answer for sequence in sequences] == plain_texts(target, texts, sampling)
    bare = [sum(nodes) == 0 for nodes in carried]
    assert bare[:3] == [False, False, True], "the first sweep that reads no prompt guesses, the next does not"
    if budget == 32:
        whole = [at for at, nodes in enumerate(bare) if nodes and len(carried[at]) == 2]
        assert whole[:3] == [2, 5, 17], "after 1, 4, 16 others"
