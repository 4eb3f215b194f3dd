"""The tree's bookkeeping against plain loops, for random shapes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specexec.tree.tree import ROOT, TokenTree, depths, highest, intervals


@st.composite
def forests(draw: st.DrawFn, most: int = 60) -> list[int]:
    """Parents of a random forest, parents before children."""
    count = draw(st.integers(0, most))
    return [draw(st.integers(ROOT, node - 1)) for node in range(count)]


def ancestors(parents: list[int], node: int) -> set[int]:
    """The node and everything above it, by walking."""
    above = set()
    while node != ROOT:
        above.add(node)
        node = parents[node]
    return above


WORKED = TokenTree.of(tokens=[5, 6, 7, 5, 8], parents=[-1, -1, 0, 0, 2], reach=[-0.1, -2.0, -0.3, -1.0, -0.4])


def test_the_worked_example_knows_its_paths_and_children() -> None:
    assert WORKED.path(4) == [0, 2, 4]
    assert WORKED.child(ROOT, 6) == 1
    assert WORKED.child(0, 5) == 3
    assert WORKED.child(0, 9) is None
    assert WORKED.depth_N.tolist() == [0, 0, 1, 1, 2]


def test_top_keeps_the_most_probable_prefixes_connected() -> None:
    kept = WORKED.top(3)
    assert kept.tokens == [5, 7, 8]
    assert kept.parents == [ROOT, 0, 1]


@given(forests())
def test_intervals_answer_ancestry_like_walking_does(parents: list[int]) -> None:
    times = intervals(np.array(parents, np.int64))
    for node in range(len(parents)):
        inside = (times.enter_N <= times.enter_N[node]) & (times.enter_N[node] < times.leave_N)
        assert set(np.flatnonzero(inside).tolist()) == ancestors(parents, node)


@given(forests())
def test_depths_count_edges(parents: list[int]) -> None:
    counted = [len(ancestors(parents, node)) - 1 for node in range(len(parents))]
    assert depths(np.array(parents, np.int64)).tolist() == counted


@given(forests(), st.integers(0, 60), st.randoms(use_true_random=False))
def test_top_is_the_best_tree_of_its_size(parents: list[int], budget: int, random: object) -> None:
    generator = np.random.default_rng(len(parents) * 61 + budget)
    reach: list[float] = []
    for parent in parents:
        reach.append((reach[parent] if parent != ROOT else 0.0) - float(generator.integers(0, 3)))
    tree = TokenTree.of(range(len(parents)), parents, reach)
    kept = tree.top(budget)
    assert sorted(kept.reach_N.tolist()) == sorted(reach)[max(len(reach) - budget, 0) :]
    for node in range(len(kept)):  # tokens were the old indices: the path must be the old one
        old = [kept.tokens[above] for above in kept.path(node)]
        assert old == tree.path(kept.tokens[node])


@given(st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, -np.inf]), max_size=40), st.integers(0, 45))
def test_the_highest_are_those_a_stable_sort_puts_first(reach: list[float], count: int) -> None:
    reach_N = np.array(reach)
    assert highest(reach_N, count).tolist() == sorted(np.argsort(-reach_N, kind="stable")[:count].tolist())
