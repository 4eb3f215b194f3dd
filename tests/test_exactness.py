"""The text is the target's own: the same for every drafter, budget, temperature and batch."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

import offload
from offload.placement.placement import Offload
from specexec.drafters.protocol import Drafter
from specexec.engine.decoder import Decoder
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import REFERENCE, BestFirst
from specexec.sampling.params import SamplingParams
from tests.tiny import tiny
from tests.writing import drafters, greedy, plain_texts, prompt, sequence_of, write

LENGTH = 12
PROMPT = prompt(21)


class Case:
    """One target and the drafters to try it with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = TreeLM(tiny("llama", folder / "target"))
        self.drafters: dict[str, Drafter] = drafters("llama", folder)
        self.greedy = greedy(tiny("llama", folder / "truth"), PROMPT, LENGTH)

    def text(self, drafter: str, budget: int, sampling: SamplingParams) -> list[int]:
        if (drafter, budget) == ("none", 0):
            return plain_texts(self.target, [PROMPT], sampling)[0]
        return write(self.target, self.drafters[drafter], [PROMPT], sampling, budget)[0].answer


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("case"))
    yield case
    case.target.close()


@pytest.mark.parametrize("budget", [0, 1, 7, 64, 512])
@pytest.mark.parametrize("drafter", ["none", "useless", "perfect"])
def test_greedy_text_is_that_of_transformers(case: Case, drafter: str, budget: int) -> None:
    assert case.text(drafter, budget, SamplingParams(temperature=0.0, max_tokens=LENGTH)) == case.greedy


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=LENGTH),
        SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=LENGTH),
        SamplingParams(temperature=1.0, min_p=0.05, seed=3, max_tokens=LENGTH),
        SamplingParams(temperature=0.9, seed=4, max_tokens=LENGTH, repetition_penalty=1.3),
        SamplingParams(
            temperature=0.9, seed=5, max_tokens=LENGTH, presence_penalty=0.7, frequency_penalty=0.4, top_p=0.8
        ),
    ],
    ids=["top_p", "top_k", "min_p", "repetition", "openai_penalties"],
)
def test_same_seed_same_text_whatever_the_tree(case: Case, sampling: SamplingParams) -> None:
    expected = case.text("none", 0, sampling)
    assert len(expected) == LENGTH
    for drafter, budget in [("useless", 64), ("perfect", 1), ("perfect", 7), ("perfect", 64), ("perfect", 512)]:
        assert case.text(drafter, budget, sampling) == expected, (drafter, budget)


# Without a drafter, or with a budget of none, decoding is plain: two of those eight cells are enough.
CELLS = [("none", 64), ("perfect", 0), *product(["sibling", "useless", "perfect"], [1, 7, 64, 512])]


@pytest.mark.parametrize("tier", ["none", "ram", "disk"])
@pytest.mark.parametrize("warm", [False, True], ids=["0.8", "1.2"])
def test_same_seed_same_text_from_every_tier_drafter_budget_and_batch(case: Case, warm: bool, tier: Offload) -> None:
    """Every cell in every tier, at both temperatures, alone and in a batch: each two of these meet."""
    cool = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=6)
    sampling = SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=6) if warm else cool
    expected = case.text("none", 0, sampling)
    target = TreeLM(offload.load(case.folder / "target", tier))
    for number, (drafter, budget) in enumerate(CELLS):
        if (number // 2 + (tier == "ram")) % 2 == warm:  # the other half at the other temperature
            continue
        before = [prompt(40)] if (number + (tier == "disk")) % 2 else []
        texts = write(target, case.drafters[drafter], [*before, PROMPT], sampling, budget)
        assert texts[-1].answer == expected, (drafter, budget, len(texts))
    target.close()


def test_the_largest_budget_decodes(case: Case) -> None:
    sampling = SamplingParams(temperature=0.9, seed=1, max_tokens=5)
    decoder = Decoder(case.target, case.drafters["useless"], BestFirst(), 4096)
    sequence = sequence_of(PROMPT, sampling)
    decoder.join(sequence)
    nodes = []
    while decoder.live:
        nodes.append(decoder.step()[0].burst.nodes)
    assert sequence.answer == case.text("none", 0, sampling)
    assert nodes[0] == 4096


@pytest.mark.parametrize("drafter", ["useless", "perfect", "confident"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_guessing_while_the_weights_move_changes_nothing(case: Case, drafter: str, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=6, max_tokens=12)
    prompts = [PROMPT, prompt(9)]
    serial, overlapped = (
        [one.answer for one in write(case.target, case.drafters[drafter], prompts, sampling, 16, overlap=overlap)]
        for overlap in (False, True)
    )
    assert serial == overlapped


@pytest.mark.parametrize("drafter", ["none", "useless", "perfect"])
def test_the_automatic_budget_changes_nothing(case: Case, drafter: str) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    assert write(case.target, case.drafters[drafter], [PROMPT], sampling, "auto")[0].answer == case.greedy


def test_another_seed_is_another_text(case: Case) -> None:
    texts = [case.text("none", 0, SamplingParams(temperature=1.0, seed=seed, max_tokens=8)) for seed in (1, 2)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_planners_differ_in_speed_only(case: Case, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=LENGTH)
    expected = case.text("none", 0, sampling)
    for drafter, planner in [("reference", REFERENCE), ("blind", BestFirst()), ("perfect", BestFirst(2, 3, 5))]:
        assert write(case.target, case.drafters[drafter], [PROMPT], sampling, 32, planner)[0].answer == expected


def test_other_texts_change_nothing(case: Case) -> None:
    sampling = SamplingParams(temperature=0.9, seed=3, max_tokens=LENGTH)
    prompts = [prompt(length, seed=length) for length in (1, 5, 60, 300)]
    alone = [write(case.target, case.drafters["perfect"], [tokens], sampling)[0].answer for tokens in prompts]
    together = write(case.target, case.drafters["perfect"], prompts, sampling)
    assert [sequence.answer for sequence in together] == alone


def test_newcomers_and_leavers_change_nothing(case: Case) -> None:
    sampling = SamplingParams(temperature=0.9, seed=3, max_tokens=LENGTH)
    alone = write(case.target, case.drafters["useless"], [PROMPT], sampling)[0].answer
    decoder = Decoder(case.target, case.drafters["useless"], BestFirst(), 16)
    first, second, third = (sequence_of(tokens, sampling) for tokens in (PROMPT, prompt(40), PROMPT))
    decoder.join(first)
    decoder.step()
    decoder.join(second)
    decoder.step()
    decoder.leave(second)
    decoder.join(third)
    while decoder.live:
        decoder.step()
    assert first.answer == third.answer == alone


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_a_perfect_drafter_is_accepted_whole(case: Case, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=60, top_p=0.9)
    decoder = Decoder(case.target, case.drafters["confident"], BestFirst(), 9)
    decoder.join(sequence_of(PROMPT, sampling))
    for _ in range(5):
        (step,) = decoder.step()
        assert step.burst.nodes == step.burst.accepted == 9
        assert len(step.burst.tokens) == 10


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11])
def test_max_tokens_is_exact(case: Case, count: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=count)
    (sequence,) = write(case.target, case.drafters["confident"], [PROMPT], sampling, budget=9)
    assert sequence.answer == case.greedy[:count]
    assert sequence.finish_reason == "length"


def test_the_context_is_filled_to_the_last_token_and_not_beyond(case: Case) -> None:
    decoder = Decoder(case.target, case.drafters["confident"], BestFirst(), 30)
    sequence = sequence_of(PROMPT, SamplingParams(temperature=0.0), limit=len(PROMPT) + 7)
    decoder.join(sequence)
    while decoder.live:
        assert decoder.step()[0].burst.tree.depth_N.max() < 6
    assert sequence.answer == case.greedy[:7]
    assert sequence.finish_reason == "length"


@pytest.mark.parametrize("at", range(8))
def test_a_stop_token_ends_the_text_anywhere_in_a_burst(case: Case, at: int) -> None:
    decoder = Decoder(case.target, case.drafters["confident"], BestFirst(), 6)
    sequence = sequence_of(PROMPT, SamplingParams(temperature=0.0, max_tokens=30))
    stop = case.greedy[at]
    first = case.greedy.index(stop)
    sequence.stop_tokens = frozenset([stop, 999_999])
    decoder.join(sequence)
    text = ""
    while decoder.live:
        text += decoder.step()[0].burst.text
    assert sequence.answer == case.greedy[: first + 1]
    assert text == "".join(f"{token} " for token in case.greedy[:first])  # the stop token itself is not text
    assert sequence.finish_reason == "stop"
    assert len(sequence.cache(case.target)) <= len(sequence.tokens) - 1


def test_a_second_request_reuses_what_both_texts_share(case: Case) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    (first,) = write(case.target, case.drafters["perfect"], [PROMPT], sampling)
    again = sequence_of([*PROMPT[:15], 7, 8, 9], sampling)
    again.caches = first.caches
    assert len(again.cache(case.target)) == 15
    decoder = Decoder(case.target, case.drafters["perfect"], BestFirst(), 16)
    decoder.join(again)
    while decoder.live:
        decoder.step()
    (fresh,) = write(case.target, case.drafters["none"], [again.tokens[: again.prompt_length]], sampling)
    assert again.answer == fresh.answer
