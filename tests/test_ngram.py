"""Retrieval alone: exact like any drafter, quick to learn from its own past, and honest about its chances."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from specexec.drafters.cost import CostModel
from specexec.drafters.ngram import NgramDrafter, with_noise
from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.retrieval import memory as memories
from specexec.drafters.retrieval.hit_rates import Hits
from specexec.drafters.retrieval.memory import HORIZONS, Memory, cells_of, prior
from specexec.drafters.retrieval.suffix_index import RUNGS, Settled
from specexec.engine.decoder import Decoder, Step
from specexec.model.tree_lm import TreeLM
from specexec.planning.baselines import planner_of
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, TokenTree
from tests.tiny import tiny
from tests.writing import greedy, plain_texts, prompt, sequence_of, write

LENGTH = 30
PROMPT = prompt(21)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=LENGTH),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=LENGTH),
    SamplingParams(temperature=1.2, seed=2, max_tokens=LENGTH, repetition_penalty=1.3),
]


class Case:
    """One target, and what it writes by itself."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("llama", folder / "target"))
        self.greedy = greedy(tiny("llama", folder / "truth"), PROMPT, LENGTH)

    def plain(self, sampling: SamplingParams) -> list[int]:
        return plain_texts(self.target, [PROMPT], sampling)[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("case"))
    yield case
    case.target.close()


def steps(target: TreeLM, drafter: NgramDrafter, sampling: SamplingParams, budget: int) -> list[Step]:
    decoder = Decoder(target, drafter, BestFirst(), budget)
    decoder.join(sequence_of(PROMPT, sampling))
    taken: list[Step] = []
    while decoder.live:
        taken += decoder.step()
    return taken


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams, overlap: bool) -> None:
    drafter = NgramDrafter()
    for budget in (16, 64):  # the second time it knows the answer
        (sequence,) = write(case.target, drafter, [PROMPT], sampling, budget, overlap=overlap)
        assert sequence.answer == case.plain(sampling)


def test_greedy_text_is_that_of_transformers(case: Case) -> None:
    drafter = NgramDrafter()
    assert write(case.target, drafter, [PROMPT], SAMPLINGS[0])[0].answer == case.greedy


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_what_was_written_before_is_accepted_whole(case: Case, sampling: SamplingParams) -> None:
    drafter = NgramDrafter()
    write(case.target, drafter, [PROMPT], sampling)
    again = steps(case.target, drafter, sampling, budget=9)
    assert len(again) <= LENGTH // 10 + 1  # a text that says the same thing twice may cost one doubt


def test_a_corpus_that_holds_the_answer_is_accepted_whole(case: Case) -> None:
    drafter = NgramDrafter(Memory(corpus=Settled.of([prompt(500, seed=4), [*PROMPT, *case.greedy]])))
    assert len(steps(case.target, drafter, SAMPLINGS[0], budget=9)) == LENGTH // 10


def test_a_text_that_repeats_itself_comes_in_long_bursts() -> None:
    drafter = NgramDrafter()
    sequence = sequence_of([1, 2, 3, 4, 5, 6, 7, 8] * 4, SAMPLINGS[0])
    (tree,) = BestFirst().grow(drafter, [sequence], FixedBudget(24), CostModel())
    path = tree.path(int(tree.depth_N.argmax()))
    assert [tree.tokens[node] for node in path] == ([1, 2, 3, 4, 5, 6, 7, 8] * 3)[: len(path)]
    assert len(path) >= 20


def test_fewer_look_ups_lose_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most nodes of a large batch are asked about in vain."""
    asked: list[int] = []
    guess = NgramDrafter.guess

    def counting(self: NgramDrafter, asks: list[Ask], width: int) -> list[Guesses]:
        asked[-1] += sum(len(ask.nodes) for ask in asks)
        return guess(self, asks, width)

    monkeypatch.setattr(NgramDrafter, "guess", counting)
    corpus = [(at * at // 7 + at // 3) % 23 for at in range(3000)]
    chances: list[float] = []
    for planner in (BestFirst(), planner_of("best", ["ngram"])):
        asked.append(0)
        drafter = NgramDrafter(Memory(corpus=Settled.of([corpus])))
        (tree,) = planner.grow(drafter, [sequence_of(corpus[40:60], SAMPLINGS[0])], FixedBudget(256), CostModel())
        chances.append(float(np.exp(tree.reach_N).sum()))
    assert asked[1] < 0.75 * asked[0]
    assert chances[1] > 0.99 * chances[0]
    assert planner_of("best", ["sibling", "ngram"]) == BestFirst()


def test_choices_off_the_path_are_remembered(case: Case) -> None:
    drafter = NgramDrafter()
    sequence = sequence_of([1, 2, 3], SAMPLINGS[0])
    drafter.guess([Ask(sequence, TokenTree.empty(), [ROOT])], 4)
    sequence.tokens.append(9)
    drafter.observe(
        sequence, TokenTree.of([8], [ROOT]), [9, 77], None
    )  # after the wrong guess 8 the target would say 77
    other = sequence_of([5, 8], SAMPLINGS[0])
    (guesses,) = drafter.guess([Ask(other, TokenTree.empty(), [ROOT])], 4)
    assert guesses.tokens_NK[0, 0] == 77


def test_conversations_keep_to_themselves_until_they_are_finished() -> None:
    drafter = NgramDrafter()
    first, second = (sequence_of(tokens, SAMPLINGS[0]) for tokens in ([10, 11, 12, 10, 11], [10, 11]))
    guesses = drafter.guess([Ask(one, TokenTree.empty(), [ROOT]) for one in (first, second)], 4)
    assert guesses[0].tokens_NK[0, 0] == 12
    assert not np.isfinite(guesses[1].log_probs_NK).any()


def test_a_nearer_horizon_wins_among_equally_long_matches() -> None:
    drafter = NgramDrafter(Memory(corpus=Settled.of([[1, 2, 3, 40]])))
    drafter.memory.write([1, 2, 3], [50])
    sequence = sequence_of([1, 2, 3, 60, 1, 2, 3], SAMPLINGS[0])
    (guesses,) = drafter.guess([Ask(sequence, TokenTree.empty(), [ROOT])], 4)
    assert guesses.tokens_NK[0, :3].tolist() == [60, 50, 40]


def test_the_past_outlives_the_process(case: Case) -> None:
    drafter = NgramDrafter()
    write(case.target, drafter, [PROMPT], SAMPLINGS[0])
    memory = Memory()
    memory.unpack(drafter.memory.pack(), 2**31)
    assert len(steps(case.target, NgramDrafter(memory), SAMPLINGS[0], budget=9)) == LENGTH // 10
    assert len(memory.pack(limit=30)["tokens"]) == 30


def test_every_kind_of_evidence_has_its_own_cell() -> None:
    cells = [
        cell
        for horizon in range(len(HORIZONS))
        for rung in range(len(RUNGS))
        for fallback in (False, True)
        for cell in cells_of(horizon, rung, fallback)
    ]
    assert sorted(cells) == list(range(len(prior())))


def test_chances_become_what_is_counted() -> None:
    hits = Hits(np.array([0.5, 0.5, 0.5]))
    generator = np.random.default_rng(0)
    for _ in range(100):
        hit_NK = generator.random((50, 2)) < [0.8, 0.05]
        hits.count(np.tile([0, 1], (50, 1)), hit_NK, np.ones(50), sampled=False)
    chances_NK = hits.chances(np.array([[0, 1], [2, -1]]), sampled=False)
    assert chances_NK == pytest.approx(np.array([[0.8, 0.05], [0.5, 0.0]]), abs=0.03)
    assert hits.chances(np.array([[0, 0]]), sampled=False).sum() < 1
    assert hits.chances(np.array([[0]]), sampled=True)[0, 0] == 0.5


def test_the_noise_decides_between_equal_chances_and_against_the_rest() -> None:
    chances_NK = np.array([[0.4, 0.4, 0.0]])
    favoured = np.exp(with_noise(chances_NK, np.array([[5.0, 0.0, 9.0]])))[0]
    assert favoured[0] > 0.9
    assert favoured[2] == 0
    assert np.exp(with_noise(chances_NK, np.array([[-2.0, -2.0, 0.0]])))[0].sum() < 0.5


def test_noise_aware_chances_are_true_on_average() -> None:
    generator = np.random.default_rng(3)
    probs_V = np.array([0.5, 0.2, 0.1, *[0.2 / 50] * 50])
    noise_NV = generator.gumbel(size=(20_000, len(probs_V)))
    chosen_N = (np.log(probs_V) + noise_NV).argmax(1)
    said_NK = np.exp(with_noise(np.tile(probs_V[:3], (20_000, 1)), noise_NV[:, :3]))
    assert said_NK.sum(1).mean() == pytest.approx((chosen_N < 3).mean(), abs=0.02)


def test_a_reader_that_was_never_asked_learns_no_wrong_thing() -> None:
    drafter = NgramDrafter()
    before = drafter.memory.hits.seen_RC.copy()
    sequence: Sequence = sequence_of([1, 2], SAMPLINGS[0])
    sequence.tokens.append(3)
    drafter.observe(sequence, TokenTree.empty(), [3], None)
    assert (drafter.memory.hits.seen_RC == before).all()


def test_the_past_takes_no_more_memory_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "PAST_LIMIT", 200)
    memory, unbounded = Memory(), Memory()
    for number in range(50):
        text = prompt(20, seed=number)
        memory.write(text[:5], text[5:])
        unbounded.written.append(text)
    assert 200 <= memory.written_tokens == sum(len(text) + 1 for text in memory.written) < 200 + 21
    assert (memory.pack(200)["tokens"] == unbounded.pack(200)["tokens"]).all()
