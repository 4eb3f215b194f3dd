"""While a sweep streams, whole next trees grow below the likeliest ways out of the submitted one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Guesses
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import FixedBudget
from specexec.planning.likely_exits import Exits
from specexec.sampling.params import SamplingParams
from specexec.sizes import drafted
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree
from tests.writing import sequence_of

WIDTH = 6


class Whimsical:
    """What it expects after a text depends on the whole text; it counts the nodes of every pass."""

    name = "whimsical"
    context = 512

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.answered: list[int] = []

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        self.answered.append(sum(len(ask.nodes) for ask in asks))
        return [self._children(ask) for ask in asks]

    def _children(self, ask: Ask) -> Guesses:
        texts = [(*ask.sequence.tokens, *ask.tree.spelled(node)) for node in ask.nodes]
        rows = [np.random.default_rng([self.seed, *text]) for text in texts]
        log_probs_NK = np.log(np.stack([0.999 * rng.dirichlet(np.full(WIDTH, 0.4)) + 1e-6 for rng in rows]))
        return Guesses(np.stack([rng.permutation(40)[:WIDTH] for rng in rows]), log_probs_NK)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None: ...


def text(*tokens: int, nodes: int = 4096) -> Sequence:
    sequence = sequence_of([1, 2, 3, *tokens], SamplingParams(max_tokens=200))
    sequence.most_nodes = nodes
    return sequence


def spelled(tree: TokenTree) -> dict[tuple[int, ...], float]:
    return {tree.spelled(node): float(tree.reach_N[node]) for node in range(len(tree))}


def ways_out(sequence: Sequence, submitted: TokenTree) -> list[int]:
    """Every node outside the tree whose parent is in it, likeliest first."""
    inside, tree = {ROOT, *submitted.ids_N.tolist()}, sequence.growth.tree
    found = [node for node in range(len(tree)) if node not in inside and int(tree.parents_N[node]) in inside]
    return sorted(found, key=lambda node: -tree.reach_N[node])


@given(st.integers(0, 10_000), st.integers(1, 24))
@settings(max_examples=20)
def test_the_next_tree_below_a_likely_exit_is_the_one_that_would_have_been_grown_after_it(
    seed: int, nodes: int
) -> None:
    drafter, planner, sequence = Whimsical(seed), BestFirst(width=WIDTH), text()
    (tree,) = planner.grow(drafter, [sequence], FixedBudget(nodes), CostModel())
    passes = iter(range(200))
    planner.grow_on(drafter, [sequence], [tree], lambda: next(passes, None) is None)
    for node in ways_out(sequence, tree)[:4]:
        tokens = sequence.growth.tree.spelled(node)
        kept = sequence.growth.below(tokens)
        assert kept is not None, "the likeliest exits come first"
        later = text(*tokens)
        later.growth = sequence.growth.moved_on(tokens, kept, True)
        drafter.answered.clear()
        (ready,) = planner.grow(drafter, [later], FixedBudget(nodes), CostModel())
        assert not drafter.answered, "decoding does not wait for the drafter"
        (fresh,) = planner.grow(drafter, [text(*tokens)], FixedBudget(nodes), CostModel())
        assert spelled(ready) == pytest.approx(spelled(fresh))


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=30)
def test_no_more_is_asked_than_there_is_room_for(seed: int, nodes: int) -> None:
    drafter, planner, sequence = Whimsical(seed), BestFirst(width=WIDTH), text(nodes=nodes)
    (tree,) = planner.grow(drafter, [sequence], FixedBudget(nodes), CostModel())
    planner.grow_on(drafter, [sequence], [tree], lambda: False)
    assert sequence.growth.asked <= drafted(nodes)


def test_a_pass_reads_no_more_nodes_for_many_texts_than_for_one() -> None:
    drafter, planner, live = Whimsical(3), BestFirst(width=WIDTH, beams=16), [text(4), text(5), text(6)]
    trees = planner.grow(drafter, live, FixedBudget(12), CostModel())
    drafter.answered.clear()
    passes = iter(range(30))
    planner.grow_on(drafter, live, trees, lambda: next(passes, None) is None)
    assert max(drafter.answered) == 16
    assert all(one.growth.asked > len(tree) for one, tree in zip(live, trees, strict=True))


def test_where_nothing_was_guessed_nothing_is_guessed_ahead() -> None:
    drafter, sequence = Whimsical(0), text()
    BestFirst().grow_on(drafter, [sequence], [TokenTree.empty()], lambda: False)
    assert not drafter.answered


def test_below_a_submitted_node_that_was_not_asked_about_only_likely_children_are_kept() -> None:
    sequence = text()
    sequence.growth = Growth()
    sequence.growth.add([ROOT], *table([[4]], [[-0.1]]), bar=-10.0)
    exits = Exits(sequence, sequence.growth.tree)
    assert exits.open_nodes(depth=64, most=64, room=64) == [0]
    assert exits.bars([0], np.array([[-0.2, -9.0]])).tolist() == [[np.inf]]
    sequence.growth.add([0], *table([[6, 7]], [[-0.2, -9.0]]), bar=np.array([[np.inf]]))
    sequence.growth.unfold()
    assert sequence.growth.tree.tokens == [4, 6]
    assert exits.open_nodes(depth=64, most=64, room=64) == [1], "a way out like any other"


def table(tokens: list[list[int]], log_probs: list[list[float]]) -> tuple[Ints, Floats]:
    return np.array(tokens, np.int64), np.array(log_probs)
