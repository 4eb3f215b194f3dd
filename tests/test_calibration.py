"""tau is learned from choices, quickly, and makes a drafter's confidence true."""

import tracemalloc

import numpy as np
import pytest

from specexec.drafters.calibration import GRID_G, NEUTRAL_TAU, Calibration, log_softmax, losses

CANDIDATES = 64


def sweep(generator: np.random.Generator, tau: float, nodes: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of some nodes, and choices that follow softmax(scores / tau)."""
    scores_NC = -np.sort(-generator.normal(0, 3, (nodes, CANDIDATES)), axis=1)
    probs_NC = np.exp(log_softmax(scores_NC / tau))
    hit_N = np.array([generator.choice(CANDIDATES, p=probs_C) for probs_C in probs_NC])
    return scores_NC, hit_N, generator.random(nodes)


@pytest.mark.parametrize("tau", [0.15, 0.5, 1.0, 2.0])
def test_the_true_tau_is_found_within_a_few_sweeps(tau: float) -> None:
    calibration, generator = Calibration(), np.random.default_rng(1)
    assert calibration.tau == NEUTRAL_TAU
    for _ in range(5):
        calibration.learn(*sweep(generator, tau))
    assert calibration.tau == pytest.approx(tau, rel=0.25)


def test_a_change_of_subject_is_followed() -> None:
    calibration, generator = Calibration(), np.random.default_rng(2)
    for tau in (0.3, 1.5):
        for _ in range(60):
            calibration.learn(*sweep(generator, tau))
        assert calibration.tau == pytest.approx(tau, rel=0.3)


def test_confidence_comes_true() -> None:
    calibration, generator = Calibration(), np.random.default_rng(3)
    for _ in range(40):
        calibration.learn(*sweep(generator, tau=2.5))
    neutral, learned = calibration.expected_error
    assert neutral > 0.15
    assert learned < neutral / 3


def test_choices_outside_the_candidates_lower_all_hopes() -> None:
    calibration, generator = Calibration(), np.random.default_rng(4)
    scores_NC, hit_N, _ = sweep(generator, 1.0, nodes=400)
    hit_N[::4] = -1
    calibration.learn(scores_NC, hit_N, np.ones(400))
    assert calibration.miss == pytest.approx(0.25, abs=0.02)


def test_nothing_is_learned_from_nothing() -> None:
    calibration = Calibration()
    calibration.learn(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    forbidden = np.array([[1.0, -np.inf]])
    calibration.learn(forbidden, np.array([1]), np.ones(1))
    assert calibration.tau == NEUTRAL_TAU
    assert calibration.weight == 0


def test_learning_takes_little_beside_what_it_learns_from() -> None:
    calibration, generator = Calibration(), np.random.default_rng(5)
    scores_NC = -np.sort(-generator.normal(0, 3, (512, 256)), axis=1)
    tracemalloc.start()
    calibration.learn(scores_NC, np.zeros(512, np.int64), np.ones(512))
    peak_B = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_B < 3 * scores_NC.nbytes


def test_the_loss_of_every_tau_is_that_of_its_softmax() -> None:
    scores_NC, hit_N, _ = sweep(np.random.default_rng(6), 1.0, nodes=20)
    for tau, loss_N in zip(GRID_G, losses(scores_NC, hit_N).T, strict=True):
        chances_NC = np.exp(scores_NC / tau) / np.exp(scores_NC / tau).sum(1, keepdims=True)
        assert loss_N == pytest.approx(np.minimum(-np.log(chances_NC[np.arange(20), hit_N]), 20.0))
