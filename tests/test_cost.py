"""Costs are learned from what is seen, and a guess is made only where it earns its seconds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specexec.drafters.cost import CostModel, Line
from specexec.planning.budget import RETRY_SWEEPS, AutoBudget, FixedBudget, Spent
from specexec.sizes import FIRST_NODES, MOST_NODES, Widths, nodes_of
from specexec.tree.tree import Floats


def learned(stream_s: float, base_s: float, slope_s: float, draft_s: float = 0.01) -> CostModel:
    """A cost model that has seen thirty sweeps and passes of a machine with these true costs."""
    cost, generator = CostModel(), np.random.default_rng(0)
    for _ in range(30):
        rows = int(generator.integers(1, 1200))
        compute_s = base_s + slope_s * rows
        cost.learn_sweep(rows, max(stream_s, compute_s), max(stream_s - compute_s, 0.0))
        cost.learn_draft(int(generator.integers(1, 30)), draft_s, asked_reach=1.0, won_reach=0.5)
    return cost


@given(st.floats(0.001, 1), st.floats(1e-5, 1e-2))
def test_a_line_is_found(base: float, slope: float) -> None:
    line = Line()
    for rows in (1, 50, 9, 130, 64, 20):
        line.learn(rows, base + slope * rows)
    assert float(line.at(300.0)) == pytest.approx(base + slope * 300, rel=0.02)


def test_one_size_alone_promises_nothing_for_free() -> None:
    line = Line()
    for _ in range(10):
        line.learn(64, 0.5)
    assert float(line.at(64.0)) == pytest.approx(0.5)
    assert float(line.at(640.0)) > 1


def test_a_sweep_costs_the_stream_until_arithmetic_takes_longer() -> None:
    cost = learned(stream_s=1.0, base_s=0.05, slope_s=0.002)
    assert float(cost.sweep_s(10.0)) == pytest.approx(1.0, rel=0.05)
    assert float(cost.sweep_s(2000.0)) == pytest.approx(4.05, rel=0.05)
    assert cost.idle_s(10) == pytest.approx(0.93, abs=0.06)


def test_a_stream_that_grows_with_the_rows_is_learned_from_any_of_them() -> None:
    def share(rows: Floats | float) -> Floats:
        return np.minimum(np.asarray(rows) / 100, 1.0)

    cost, generator = CostModel(share=share), np.random.default_rng(0)
    for _ in range(30):
        rows = int(generator.integers(1, 200))
        stream_s, compute_s = 4.0 * float(share(rows)), 0.001 * rows
        cost.learn_sweep(rows, max(stream_s, compute_s), max(stream_s - compute_s, 0.0))
    assert [float(cost.sweep_s(rows)) for rows in (10.0, 50.0, 300.0)] == pytest.approx([0.4, 2.0, 4.0], rel=0.01)
    steep = cost.best_size(chances(), rows=1, sequences=1, drafted_s=0.0)
    assert steep < 10 < learned(4.0, 0.0, 0.001).best_size(chances(), rows=1, sequences=1, drafted_s=0.0)


def chances(count: int = 1000) -> np.ndarray:
    return 0.8 * 0.99 ** np.arange(count)


@pytest.mark.parametrize(("stream_s", "slope_s"), [(1.0, 0.001), (0.0, 0.01), (0.1, 0.004)])
def test_the_size_is_the_one_of_most_tokens_per_second(stream_s: float, slope_s: float) -> None:
    cost = learned(stream_s, base_s=0.05, slope_s=slope_s)
    size = cost.best_size(chances(), rows=3, sequences=1, drafted_s=0.1)
    rates = [
        (1 + chances()[:nodes].sum()) / (0.1 + max(stream_s, 0.05 + slope_s * (nodes + 3))) for nodes in range(1001)
    ]
    assert rates[size] > 0.97 * max(rates)


def test_costs_never_measured_are_approached_in_steps() -> None:
    cost = CostModel()
    for _ in range(10):
        cost.learn_sweep(40, 0.05, 0.0)
        cost.learn_sweep(50, 0.05, 0.0)  # as if more rows were free
    assert cost.best_size(chances(5000), rows=4, sequences=1, drafted_s=0.0) <= 100
    cost.learn_sweep(100, 4.0, 0.0)  # they are not: believed at once, however strange it looks
    assert cost.best_size(chances(5000), rows=4, sequences=1, drafted_s=0.0) < 60


def test_guesses_that_lengthen_a_sweep_that_waits_are_not_free() -> None:
    """Half of each row is computed while the weights travel, half behind the last layer."""
    cost, chance_N = CostModel(), 0.8 * np.exp(-0.006 * np.arange(4000.0))

    def sweep(rows: int) -> None:
        compute_s, seconds = 0.001 * rows, max(1.0 + 0.0005 * rows, 0.001 * rows)
        cost.learn_sweep(rows, seconds, seconds - compute_s)

    cost.learn_sweep(3000, 3.0, 0.0, prompt=True)
    for _ in range(40):
        sweep(4 + cost.best_size(chance_N, rows=4, sequences=1, drafted_s=0.0))
    # The next guess wins its chance of a token and takes half a millisecond of the time of some 130 in a second.
    assert cost.best_size(chance_N, rows=4, sequences=1, drafted_s=0.0) < 600
    cost.learn_sweep(1500, 2.2, 0.5, prompt=True)
    assert float(cost.sweep_s(0.0)) == pytest.approx(1.0, rel=0.1)


def test_slow_streams_deserve_large_trees() -> None:
    sizes = [
        learned(stream_s, 0.05, 0.001).best_size(chances(), rows=3, sequences=1, drafted_s=0.0)
        for stream_s in (0.0, 0.2, 1.0)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 300 < sizes[-1]


def test_drafting_stops_where_a_pass_costs_more_than_it_wins() -> None:
    spent = Spent(rows=2, sequences=1, drafted_s=0.1)
    slow, fast = learned(0.02, 0.01, 1e-4, draft_s=0.5), learned(2.0, 0.01, 1e-4, draft_s=0.001)
    asked_N = np.full(5, 0.06)
    assert not AutoBudget(slow).worth_asking(asked_N, chances(20), spent)
    assert AutoBudget(fast).worth_asking(asked_N, chances(20), spent) == 5


def test_unlikely_nodes_do_not_keep_the_likely_ones_from_being_asked() -> None:
    cost = CostModel()
    for nodes in (1, 40, 300, 1000):
        cost.learn_sweep(nodes, 1.4, 1.3)
        cost.learn_draft(nodes, 0.03 + 0.002 * nodes, asked_reach=1.0, won_reach=0.6)
    open_N = np.sort(np.concatenate([np.full(32, 0.6), np.full(992, 0.01)]))[::-1]  # 32 texts, 32 children each
    assert cost.worth_asking(open_N, open_N, rows=32, sequences=32, drafted_s=0.1) == 32
    assert cost.worth_asking(open_N[32:], open_N, rows=32, sequences=32, drafted_s=0.1) == 0


def test_drafting_that_never_pays_is_tried_again() -> None:
    budget = AutoBudget(learned(0.001, 0.001, 0.0, draft_s=5.0))
    spent = Spent(rows=1, sequences=1, drafted_s=0.0)
    tried = [budget.worth_asking(np.ones(1), np.zeros(0), spent) for _ in range(3 * RETRY_SWEEPS)]
    assert sum(tried) == 3


def test_nothing_known_means_a_modest_tree_and_a_fixed_budget_stays_fixed() -> None:
    spent = Spent(rows=1, sequences=3, drafted_s=0.0)
    assert AutoBudget(CostModel()).size(chances(), spent) == 3 * FIRST_NODES
    assert FixedBudget(7).size(chances(), spent) == 21
    assert not FixedBudget(0).worth_asking(np.ones(1), chances(), spent)
    assert FixedBudget(7).worth_asking(np.full(9, 1e-9), chances(), spent) == 9


def test_auto_makes_room_for_as_many_guesses_as_an_eighth_of_the_memory_holds() -> None:
    llama_70b = Widths(8192, 28672, 64, 128, 80, 128256, 2, 80 * 2 * 8 * 128 * 2, 2 * 8 * 128)
    sizes = [nodes_of("auto", llama_70b, 8192, GiB << 30) for GiB in (1, 4, 8, 24, 96)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (256, MOST_NODES)
    assert 256 < sizes[2] < MOST_NODES
    assert nodes_of(7, llama_70b, 8192, 1 << 30) == 7
    cost = learned(1.0, 0.001, 1e-9)  # another guess costs nothing here
    cost.compute.most = 5000
    chance_N, spent = np.full(4000, 0.9), Spent(1, 1, 0.0)
    assert AutoBudget(cost).size(chance_N, spent) == 4000
    assert (AutoBudget(cost, 256).size(chance_N, spent), AutoBudget(cost, 256).horizon(chance_N, spent)) == (256, 256)


def test_one_more_node_must_win_back_its_seconds() -> None:
    cost, price = CostModel(gain=0.5), Line()
    assert cost.floor(price) == -np.inf
    for nodes in (10, 20, 30):
        price.learn(nodes, 1.0 + 0.005 * nodes)
    assert cost.floor(price) == -np.inf  # seconds are not counted
    cost.learn_rate(20, 2.0)
    assert np.exp(cost.floor(price)) == pytest.approx(10 * 0.005 / 0.5)
    cost.learn_rate(0, 2.0)  # a fixed budget
    assert cost.floor(price) == -np.inf


def test_no_node_is_asked_about_whose_experts_cost_more_than_it_may_win() -> None:
    """A quarter of the second is shared, each row adds 3/256: at 1.9 tokens in 70/256 s that is 0.08 of a token."""
    asked = {}
    for name, share in (
        ("dense", np.ones_like),
        ("experts", lambda rows: 0.25 + 0.75 * np.minimum(np.asarray(rows) / 64, 1.0)),
    ):
        cost = CostModel(share=share)
        for rows in (1, 4, 16):
            seconds = float(np.asarray(share(float(rows))))
            cost.learn_sweep(rows, seconds, waited_s=seconds - 1e-4)
            cost.learn_draft(rows, 1e-6, asked_reach=1.0, won_reach=1.0)
        asked[name] = cost.worth_asking(np.array([0.9, 0.6, 0.1, 0.06]), np.array([0.9]), 1, 1, 0.0)
    assert asked == {"dense": 4, "experts": 3}
