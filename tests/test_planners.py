"""Other shapes of trees: the same text, and each is what its name says."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specexec.drafters.cost import CostModel
from specexec.drafters.ngram import NgramDrafter
from specexec.engine.decoder import Decoder
from specexec.planning.baselines import NAMES, Beam, Sequoia, planner_of, ranking_of
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import AutoBudget, FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.tree.growing import Growth
from specexec.tree.static_shape import static_tree
from tests.writing import TargetAndDrafters, plain_texts, prompt, samplings, sequence_of, write

LENGTH = 24
PROMPT = prompt(21)
SAMPLINGS = samplings(LENGTH)


@pytest.mark.parametrize("sampling", samplings(14), ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["beam", "sequoia"])
def test_planners_differ_in_speed_only(llama: TargetAndDrafters, name: str, sampling: SamplingParams) -> None:
    prompts = [PROMPT, prompt(5, seed=5)]
    expected = [plain_texts(llama.target, [tokens], sampling)[0] for tokens in prompts]
    for drafter in ("useless", "perfect"):
        for overlap in (False, True):
            written = write(
                llama.target, llama.drafters[drafter], prompts, sampling, 12, planner_of(name), overlap=overlap
            )
            assert [one.answer for one in written] == expected


@pytest.mark.parametrize("name", ["beam", "sequoia"])
def test_a_perfect_drafter_pays(llama: TargetAndDrafters, name: str) -> None:
    decoder = Decoder(llama.target, llama.drafters["confident"], planner_of(name), 24)
    decoder.join(sequence_of(PROMPT, SamplingParams(temperature=0.0, max_tokens=60)))
    bursts = []
    while decoder.live:
        bursts += [step.burst for step in decoder.step()]
    assert all(burst.nodes <= 24 for burst in bursts)
    assert 60 / len(bursts) > (8 if name == "sequoia" else 10)


def test_a_beam_is_as_wide_on_every_level(llama: TargetAndDrafters) -> None:
    sequence = sequence_of(PROMPT, SAMPLINGS[0])
    (tree,) = Beam(depth=5).grow(llama.drafters["useless"], [sequence], FixedBudget(20), CostModel())
    assert np.bincount(tree.depth_N).tolist() == [4] * 5


@pytest.mark.parametrize("name", ["beam", "sequoia"])
def test_an_automatic_budget_keeps_guessing_where_it_pays(name: str) -> None:
    """A stream of a second, arithmetic for nothing: the more guesses the better, also once that has been measured."""
    cost, drafter = CostModel(), NgramDrafter()
    for rows in (1, 65, 65):
        cost.learn_sweep(rows, 1.0, 0.99)
    planner, sequence = planner_of(name), sequence_of([1, 2, 3, 4, 5, 6, 7, 8] * 4, SAMPLINGS[0])
    for _ in range(3):
        (tree,) = planner.grow(drafter, [sequence], AutoBudget(cost), cost)
        assert len(tree) >= 8


def test_a_pass_that_reads_the_prompt_does_not_say_what_passes_cost() -> None:
    planner, cost, drafter = BestFirst(), CostModel(), NgramDrafter()
    sequence = sequence_of([1, 2, 3, 4, 5, 6, 7, 8] * 4, SAMPLINGS[0])
    planner.grow(drafter, [sequence], FixedBudget(8), cost)
    assert not cost.draft.known
    sequence.processed, sequence.growth = len(sequence.tokens) - 1, Growth()
    planner.grow(drafter, [sequence], FixedBudget(8), cost)
    assert cost.draft.known


def test_sequoia_learns_which_ranks_are_taken(llama: TargetAndDrafters) -> None:
    planner = Sequoia()
    assert planner.chance_K[0] == pytest.approx(0.6)
    write(
        llama.target, llama.drafters["confident"], [PROMPT], SamplingParams(temperature=0.0, max_tokens=60), 16, planner
    )
    assert planner.chance_K[0] > 0.85
    before = Sequoia()
    write(llama.target, llama.drafters["useless"], [PROMPT], SAMPLINGS[0], 16, before)
    assert before.chance_K[0] < 0.3


def dynamic_programming(chance_K: tuple[float, ...], nodes: int, depth: int) -> float:
    """The paper's recursion: the most accepted tokens that a tree of so many nodes and levels can hope for."""

    @cache
    def below(left: int, rank: int, levels: int) -> float:
        if not left or not levels or rank == len(chance_K):
            return 0.0
        return max(
            below(left, rank + 1, levels) if not size else
            chance_K[rank] * (1 + below(size - 1, 0, levels - 1)) + below(left - size, rank + 1, levels)
            for size in range(left + 1)
        )  # fmt: skip

    return below(nodes, 0, depth)


@settings(max_examples=40)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3).map(lambda chances: sorted(chances, reverse=True)),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_the_static_tree_is_that_of_dynamic_programming(chances: list[float], nodes: int, depth: int) -> None:
    total = sum(chances)
    chance_K = np.array(chances) / max(total, 1.0)
    shape = static_tree(chance_K, nodes, depth)
    assert shape.chances_N.sum() == pytest.approx(dynamic_programming(tuple(chance_K.tolist()), nodes, depth))
    assert (shape.parents_N < np.arange(len(shape.parents_N))).all()


def test_every_name_makes_a_planner() -> None:
    for name in NAMES:
        assert planner_of(name) is not None
        assert ranking_of(name) is not None
    assert planner_of("sequoia") is not planner_of("sequoia")
