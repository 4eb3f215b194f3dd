"""What decoding taught is there in the next run, for this pair alone, whole or not at all; no text depends on it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import specexec
from cli.engine.learned_store import ENOUGH, MOST_DRAFTERS, MOST_PLACES, learned_path, learning, measured, speeds_path
from cli.engine.ngram_store import load, save
from cli.shared.conditions import conditions
from cli.shared.options import EngineOptions
from offload.hub.names import demo_folder
from specexec import SamplingParams
from specexec.drafters.calibration import GRID_G, REMEMBERED_WEIGHT, Calibration
from specexec.drafters.cost import CostModel
from specexec.drafters.mixture import MOST_CELLS, MixtureWeights
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine.engine import Engine
from specexec.stats import Pace

SAMPLING = SamplingParams(temperature=0.8, seed=3, max_tokens=24)
PROMPT = "The with statement"


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    """One engine for all tests that do not mind what it has learned already."""
    with opened() as llm:
        yield llm


def opened() -> Engine:
    return specexec.load("demo", drafter="sibling+ngram", offload="none", dtype="f32", budget=16)


def sibling_of(llm: Engine) -> SiblingDrafter:
    union = llm._decoder.drafter
    assert isinstance(union, Union)
    sibling = union.members[0]
    assert isinstance(sibling, SiblingDrafter)
    return sibling


def run(llm: Engine) -> tuple[tuple[int, ...], Path]:
    """A short answer in a run that learns; the file it leaves."""
    with learning(llm, EngineOptions()):
        return llm.generate(PROMPT, SAMPLING).tokens, learned_path(llm)


def test_the_next_run_begins_where_the_last_one_ended(shared: Engine) -> None:
    first, path = run(shared)
    assert oct(path.stat().st_mode)[-3:] == "600"
    with opened() as llm, learning(llm, EngineOptions()):
        calibration = sibling_of(llm).calibration(SAMPLING)
        assert 0 < calibration.weight <= REMEMBERED_WEIGHT
        assert llm.accounting.cost.compute.known
        assert llm.generate(PROMPT, SAMPLING).tokens == first


def test_seconds_are_forgotten_where_the_weights_lie_elsewhere_and_trust_is_not(shared: Engine) -> None:
    run(shared)
    with opened() as llm, learning(llm, EngineOptions().but(link_limit_Bps=1e6)):
        assert sibling_of(llm).calibration(SAMPLING).weight
        assert not llm.accounting.cost.compute.known


def test_seconds_of_another_machine_are_left_out_and_left_there(
    shared: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shared)

    def elsewhere(device: str) -> dict[str, str]:
        return {"processor": "another"}

    for machine, known in ((elsewhere, False), (elsewhere, True), (conditions, True)):
        monkeypatch.setattr("cli.engine.learned_store.conditions", machine)
        with opened() as llm, learning(llm, EngineOptions()):
            assert sibling_of(llm).calibration(SAMPLING).weight, "calibration is the same everywhere"
            assert llm.accounting.cost.compute.known == known
            llm.generate(PROMPT, SAMPLING)


def test_costs_are_kept_of_the_last_placements(shared: Engine) -> None:
    limits = [1e9 * (1 + one) for one in range(MOST_PLACES + 2)]
    for limit in limits:
        with learning(shared, EngineOptions().but(link_limit_Bps=limit)):
            shared.generate(PROMPT, replace(SAMPLING, max_tokens=2))
    for limit, known in ((limits[1], False), (limits[2], True), (limits[-1], True)):
        with opened() as llm, learning(llm, EngineOptions().but(link_limit_Bps=limit)):
            assert llm.accounting.cost.compute.known == known
    assert sum(name.endswith("/cost/compute") for name in load(learned_path(shared), set()) or {}) == MOST_PLACES


def test_speeds_of_other_machines_make_room_for_those_of_this_one(shared: Engine) -> None:
    options = EngineOptions()

    def learn() -> None:
        shared.accounting.pace = Pace()
        with learning(shared, options):
            shared.generate(PROMPT, SAMPLING)
            shared.accounting.pace.alone.sweeps = ENOUGH

    learn()
    ((name, row),) = (load(speeds_path(options), set()) or {}).items()
    others = {f"{where}{number}/ngram": row for where in ("0", "z") for number in range(MOST_DRAFTERS)}
    save(speeds_path(options), {**others, f"{name.partition('/')[0]}/ngram": row})
    learn()
    assert measured(options).keys() == {"ngram", "sibling+ngram"}
    assert len(load(speeds_path(options), set()) or {}) == MOST_DRAFTERS


def test_speeds_are_kept_by_drafter_for_the_same_placement(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions().but(drafter="sibling+ngram", offload="none")
    shared.accounting.pace = Pace()
    with learning(shared, options):
        shared.generate(PROMPT, replace(SAMPLING, max_tokens=24))
        shared.accounting.pace.alone.sweeps = ENOUGH
        made = shared.accounting.pace.alone.tokens_per_s
    assert measured(options.but(drafter="auto")) == {"sibling+ngram": pytest.approx(made)}
    assert measured(options.but(link_limit_Bps=1e6)) == {}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("cli.engine.learned_store.conditions", lambda device: {"processor": "another"})
        assert measured(options) == {}
    (row,) = load(speeds_path(options), set()) or {}
    for damage in (np.array([np.nan, 1.0]), np.array([3.0])):
        save(speeds_path(options), {row: damage})
        assert measured(options) == {}


def test_a_run_without_a_sweep_leaves_no_file(shared: Engine) -> None:
    with learning(shared, EngineOptions()):
        pass
    assert not learned_path(shared).exists()


@pytest.mark.parametrize("damage", ["torn", "foreign", "version", "pair", "nan", "negative", "shape"])
def test_a_file_that_cannot_be_ours_costs_a_word_and_no_token(
    damage: str, shared: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    text, path = run(shared)
    arrays = dict(load(path, set()) or {})
    row = next(name for name in arrays if name.startswith("drafter/0/"))
    cost = next(name for name in arrays if name.endswith("/cost/compute"))
    match damage:
        case "torn":
            path.write_bytes(path.read_bytes()[:-40])
        case "foreign":
            save(path, {"other": np.zeros(3)})
        case "version":
            save(path, arrays | {"version": np.array([0])})
        case "pair":
            save(path, arrays | {"pair": np.zeros(8, np.uint8)})
        case "nan":
            save(path, arrays | {row: np.full(len(GRID_G) + 2, np.nan)})
        case "negative":
            save(path, arrays | {cost: -np.ones(6)})
        case "shape":
            save(path, arrays | {"drafter/mixture/counts": np.ones((3, 7)), "drafter/mixture/cells": np.ones((3, 8))})
    with caplog.at_level(logging.WARNING):
        again, _ = run(shared)
    assert "left out" in caplog.text
    assert again == text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(shared)
    assert not caplog.text, "and was replaced by a good one"


def test_a_folder_that_cannot_be_written_costs_a_word(shared: Engine, caplog: pytest.LogCaptureFixture) -> None:
    folder = learned_path(shared).parent
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert run(shared)[0]
    assert "could not be kept" in caplog.text


def test_a_remembered_calibration_is_a_start_and_no_verdict() -> None:
    calibration, generator = Calibration(), np.random.default_rng(0)
    scores = -np.sort(-generator.normal(0, 3, (4000, 16)), axis=1)
    for part in np.split(scores, 40):  # a drafter that is right much more often than it is sure
        calibration.learn(part, (generator.random(100) < 0.15).astype(np.int64), np.ones(100))
    again = Calibration.unpacked(calibration.pack())
    assert again.tau == pytest.approx(calibration.tau, rel=0.2)
    assert again.weight == pytest.approx(REMEMBERED_WEIGHT)
    for part in np.split(scores[:400], 4):  # and now knows nothing
        again.learn(part, generator.integers(0, 16, 100), np.ones(100))
    assert again.tau > 2 * calibration.tau


def test_what_is_kept_of_a_trust_is_bounded() -> None:
    mixture = MixtureWeights()
    for one in range(2000):
        mixture.learn((0, one % 6, one), np.array([0.5, 0.1]), 1.0 + one)
    arrays = mixture.pack()
    assert len(arrays["counts"]) == MOST_CELLS
    again = MixtureWeights()
    again.unpack(arrays)
    assert (again.weights((0, 1999 % 6, 1999)) == mixture.weights((0, 1999 % 6, 1999))).all()


ANYTHING = st.one_of(st.floats(1, 100), st.floats())


@given(st.lists(ANYTHING, min_size=6, max_size=6), ANYTHING)
def test_no_numbers_make_a_cost_model_that_fails(sums: list[float], gain: float) -> None:
    cost, compute = CostModel(), np.array(sums)
    try:
        cost.unpack({"compute": compute, "draft": compute[::-1], "stream": compute[::-1], "gain": np.array([gain])})
    except ValueError:
        return
    assert cost.best_size(np.full(20, 0.3), 1, 1, 0.01) >= 0
    assert cost.worth_asking(np.full(3, 0.2), np.full(20, 0.3), 1, 1, 0.01) in range(4)


def test_a_model_replaced_in_place_inherits_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_folder("target"), tmp_path / "model"))
    options = EngineOptions(model=str(folder))
    with specexec.load(str(folder), drafter="ngram", offload="none", dtype="f32", budget=8) as llm:
        before = learned_path(llm), speeds_path(options)
        assert before == (learned_path(llm), speeds_path(options))
        weights = folder / "model.safetensors"
        changed = bytearray(weights.read_bytes())
        changed[-4096:] = bytes(4096)
        weights.unlink()
        weights.write_bytes(changed)
        after = learned_path(llm), speeds_path(options)
    assert not {*before} & {*after}
