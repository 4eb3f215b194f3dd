"""Several trees in one sweep: nodes go where they are most likely to be used. K children of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Guesses
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import AutoBudget, FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.sizes import drafted
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import Ints, TokenTree
from tests.writing import sequence_of


@dataclass
class Certain:
    """Guesses one token with a probability that depends on the sequence, and a few unlikely ones beside it."""

    sure: dict[Sequence, float]
    name: str = "certain"
    context: int = 512

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        return [self._children(ask, width) for ask in asks]

    def _children(self, ask: Ask, width: int) -> Guesses:
        first = self.sure[ask.sequence]
        probs_K = np.array([first, *np.full(width - 1, (1 - first) / width)])
        shape = (len(ask.nodes), width)
        return Guesses(np.broadcast_to(np.arange(width), shape), np.broadcast_to(np.log(probs_K), shape))

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None: ...


def grow(drafter: Certain, live: list[Sequence], nodes: int) -> list[TokenTree]:
    for sequence in live:
        sequence.growth = Growth()
    return BestFirst().grow(drafter, live, FixedBudget(nodes), CostModel())


def live(*sure: float) -> Certain:
    return Certain({sequence_of([1, 2, 3], SamplingParams(max_tokens=200)): probability for probability in sure})


def test_the_sequence_that_is_easy_to_guess_gets_more_nodes() -> None:
    drafter = live(0.95, 0.3)
    easy, hard = grow(drafter, list(drafter.sure), 24)
    assert len(easy) + len(hard) == 48
    assert len(easy) > 2 * len(hard) > 0


def test_equal_sequences_share_and_none_starves() -> None:
    drafter = live(0.7, 0.7, 0.7)
    sizes = [len(tree) for tree in grow(drafter, list(drafter.sure), 20)]
    assert sum(sizes) == 60
    assert min(sizes) >= 10  # ties at the bar go to the first sequence


def test_no_node_that_was_left_out_has_more_reach_than_one_that_was_kept() -> None:
    drafter = live(0.9, 0.6, 0.2)
    kept = grow(drafter, list(drafter.sure), 16)
    alone = [grow(drafter, [sequence], 48)[0] for sequence in drafter.sure]
    bar = min(tree.reach_N.min() for tree in kept if len(tree))
    for mine, all_of_mine in zip(kept, alone, strict=True):
        assert np.sum(all_of_mine.reach_N > bar + 1e-12) <= len(mine)


@given(
    st.lists(st.floats(0.05, 0.95), min_size=1, max_size=5),
    st.one_of(st.integers(0, 60), st.just("auto")),
    st.integers(0, 90),
)
@settings(max_examples=25)
def test_no_text_is_given_more_guesses_than_memory_holds(
    sure: list[float], budget: int | Literal["auto"], most: int
) -> None:
    drafter = live(*sure)
    sequences = list(drafter.sure)
    for sequence in sequences:
        sequence.most_nodes = most
    asked = AutoBudget(CostModel(), most * len(sure)) if budget == "auto" else FixedBudget(min(budget, most))
    trees = BestFirst().grow(drafter, sequences, asked, CostModel())
    assert max(map(len, trees)) <= most
    each = most if budget == "auto" else min(most, budget)
    assert sum(map(len, trees)) <= len(sure) * each
    BestFirst().grow_on(drafter, sequences, trees, lambda: False)
    assert all(sequence.growth.asked <= drafted(most) for sequence in sequences)


def test_without_a_budget_nothing_is_guessed() -> None:
    drafter = live(0.9, 0.6)
    assert [len(tree) for tree in grow(drafter, list(drafter.sure), 0)] == [0, 0]
