"""Drafting with some sublayers of the target: every set is exact, and the search keeps to what it was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import offload
import specexec
from cli.engine.learned_store import searching
from cli.shared.options import EngineOptions
from specexec.compose.earlier_runs import EarlierRuns
from specexec.compose.load_options import LoadOptions
from specexec.compose.progress import LoadProgress
from specexec.drafters.cost import CostModel
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import (
    ANSWER,
    LEVELS,
    Judge,
    Terms,
    best_sublayers,
    choices,
    own_words,
    preferred,
    searched,
    skipping,
    spread,
)
from specexec.model.cache import KVCache
from specexec.model.sublayers import Kept, names_of, partial_lm, sizes_of
from specexec.model.submodel import layer_list_path
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import AutoBudget
from specexec.sampling.params import SamplingParams
from tests.tiny import FAMILIES, LAYERS, VOCABULARY, tiny
from tests.writing import prompt, sequence_of, write

TEXT = prompt(24)
ASKED = [prompt(6), prompt(9, seed=1)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, seed=3, max_tokens=12)
SETS: list[Kept] = [np.array(bits, bool).reshape(LAYERS, 2) for bits in product((False, True), repeat=2 * LAYERS)]


def layers_of(lm: TreeLM) -> nn.ModuleList:
    found = lm.model.get_submodule(".".join(layer_list_path(lm.model)))
    assert isinstance(found, nn.ModuleList)
    return found


def resident_layer(lm: TreeLM, kept_LS: Kept) -> dict[int, nn.Module]:
    return {number: copy.deepcopy(layers_of(lm)[number]) for number in np.flatnonzero(kept_LS.any(1)).tolist()}


def terms(resident: list[bool], most: float = 0.5, sizes: tuple[int, int] = (1, 3)) -> Terms:
    """Layers of one shape; copies of `most` of all that does not stay may be kept."""
    size_LS = np.array([sizes] * len(resident))
    copy_LS = np.where(np.array(resident)[:, None], 0, size_LS)
    return Terms(copy_LS, size_LS, head_B=2, most_B=int(most * size_LS.sum()), whole=False, rows=512)


def test_where_layers_stay_or_go_whole_no_search_begins_with_a_part_of_one() -> None:
    """As in models where only some layers have an attention of their own: the others count as MLPs alone."""
    whole = replace(terms([True, False, False], sizes=(0, 3)), whole=True)
    assert all((kept_LS[:, 0] == kept_LS[:, 1]).all() for kept_LS in whole.starts())


class Case:
    """A target and what it writes by itself."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("llama", folder))
        self.layers = layers_of(self.target)
        self.plain = {one.temperature: self.written(NoDrafter(), one) for one in (GREEDY, SAMPLED)}

    def written(self, drafter: Drafter, sampling: SamplingParams) -> tuple[list[int], KVCache]:
        (sequence,) = write(self.target, drafter, [TEXT], sampling, 12)
        return list(sequence.answer), sequence.cache(self.target)

    def resident_layer(self, number: int) -> nn.Module:
        return copy.deepcopy(self.layers[number])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("target"))
    yield case
    case.target.close()


@settings(max_examples=12)
@given(kept_LS=st.sampled_from(SETS), sampling=st.sampled_from([GREEDY, SAMPLED]))
def test_whatever_is_skipped_text_and_cache_are_those_of_plain_decoding(
    case: Case, kept_LS: Kept, sampling: SamplingParams
) -> None:
    plain, plain_cache = case.plain[sampling.temperature]
    drafter = skipping(case.target, case.resident_layer, kept_LS, VOCABULARY)
    text, cache = case.written(drafter, sampling)
    assert text == plain
    rows = min(len(cache), len(plain_cache))
    assert cache.tokens[:rows] == plain_cache.tokens[:rows]
    for layer in range(LAYERS):
        ours, theirs = cache.layers[layer], plain_cache.layers[layer]
        assert torch.allclose(ours.keys_HRD[:, :rows], theirs.keys_HRD[:, :rows], atol=1e-4)
        assert torch.allclose(ours.values_HRD[:, :rows], theirs.values_HRD[:, :rows], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_row_computes_what_a_model_without_the_sublayers_does(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path)
    target = TreeLM(model)
    layers = layers_of(target)
    named = [names_of(layer) is not None for layer in layers]
    picked = np.random.default_rng(len(family)).integers(0, len(SETS), 5)
    sets = [SETS[number] if all(named) else SETS[number][:, :1].repeat(2, 1) for number in picked.tolist()]
    sets.append(np.ones((LAYERS, 2), bool))
    tried = list(choices(target, [TEXT], sets))
    for kept_LS, found_RV in zip(sets, tried, strict=True):
        lm = partial_lm(target, lambda number: copy.deepcopy(layers[number]), kept_LS)
        (hidden_RH,) = lm.forward([Rows(KVCache(), TEXT, range(-1, len(TEXT) - 1))])
        assert torch.allclose(found_RV, lm.head(hidden_RH), atol=1e-3), kept_LS.T
    target.close()


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_streamed_layers_are_tried_in_the_sweep_that_brings_them(tier: offload.Offload, tmp_path: Path) -> None:
    resident = TreeLM(tiny("llama", tmp_path / "model"))
    streamed = TreeLM(offload.load(tmp_path / "model", tier))
    texts, sets = [prompt(90), prompt(60, seed=1)], SETS[5:200:60]  # rows for more than one chunk
    try:
        before = offload.stream_of(streamed.model).stats().layers_read
        found = list(choices(streamed, texts, sets))
        assert offload.stream_of(streamed.model).stats().layers_read == before + LAYERS
        for ours, theirs in zip(found, choices(resident, texts, sets), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-3)
    finally:
        offload.stream_of(streamed.model).close()


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_resident_layers_are_preferred(resident: list[bool]) -> None:
    kept = preferred(resident)
    assert kept == sorted(set(kept))
    assert len(kept) == max(1, round(len(resident) / 2))
    at_home = sum(resident)
    assert sum(resident[layer] for layer in kept) == min(at_home, len(kept))


def test_the_spread_is_even_and_keeps_both_ends() -> None:
    assert spread(9, 5) == [0, 2, 4, 6, 8]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(5, 1) == [0]


@settings(max_examples=12)
@given(
    resident=st.lists(st.booleans(), min_size=1, max_size=5),
    most=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 99),
)
def test_copies_never_take_more_than_they_were_given(resident: list[bool], most: float, seed: int) -> None:
    limits, rng = terms(resident, most), np.random.default_rng(seed)
    looked_at: list[Kept] = []

    def speeds(sets: Items[Kept]) -> list[float]:
        looked_at.extend(sets)
        return rng.random(len(sets)).tolist()

    found_LS = searched(limits, speeds, 48)
    assert all(limits.fits(kept_LS) for kept_LS in looked_at)
    assert len({kept_LS.tobytes() for kept_LS in looked_at}) == len(looked_at) <= 48
    copied_B = limits.copy_LS[found_LS].sum()
    assert copied_B <= most * limits.size_LS.sum()


def test_where_layers_have_no_such_parts_they_stay_or_go_whole() -> None:
    looked_at: list[Kept] = []

    def speeds(sets: Items[Kept]) -> list[float]:
        looked_at.extend(sets)
        return [float(one[1:3].sum()) - float(one.sum()) / 10 for one in sets]

    found_LS = searched(replace(terms([True] * 4), whole=True), speeds, 16)
    assert found_LS.tolist() == [[False, False], [True, True], [True, True], [False, False]]
    assert all((one[:, 0] == one[:, 1]).all() for one in looked_at)


def test_of_sets_that_guess_alike_the_one_in_memory_is_taken() -> None:
    resident = [False, True, False, True]
    limits = terms(resident, sizes=(2, 2))

    def speeds(sets: Items[Kept]) -> list[float]:
        # Any four sublayers guess as well as any others, and fewer not at all.
        return [limits.speed(one, np.array([0.7])) if one.sum() >= 4 else 0.0 for one in sets]

    assert searched(limits, speeds, 200).tolist() == [[here, here] for here in resident]


def test_the_search_finds_the_best_of_all_sets(case: Case) -> None:
    limits = Terms(
        copy_LS=np.zeros((LAYERS, 2), np.int64), size_LS=sizes_of(list(case.layers)), head_B=1, most_B=0, whole=False,
        rows=512,
    )  # fmt: skip
    judge = Judge(case.target, [TEXT], limits)
    all_of_them = dict(zip((one.tobytes() for one in SETS), judge.speeds(SETS), strict=True))
    found_LS = searched(limits, lambda sets: [all_of_them[one.tobytes()] for one in sets], 192)
    assert all_of_them[found_LS.tobytes()] == max(all_of_them.values())


def test_speed_is_that_of_the_papers_formula_for_a_chain() -> None:
    limits, half_LS = terms([True] * 4), np.array([[True, True], [False, False]] * 2)
    draft = (8 + 2) / (16 + 2)
    for alpha in (0.3, 0.6, 0.9):
        chain = max((1 - alpha ** (depth + 1)) / (1 - alpha) / (1 + depth * draft) for depth in LEVELS)
        assert limits.speed(half_LS, np.array([alpha])) == pytest.approx(chain)


def test_a_target_is_judged_by_its_own_words(case: Case) -> None:
    texts = own_words(case.target, [TEXT, TEXT[:7]])
    plain, _ = case.plain[GREEDY.temperature]
    assert texts[0][: len(TEXT) + len(plain)] == [*TEXT, *plain]
    assert texts[1][:7] == TEXT[:7]
    assert len(texts[1]) == 7 + ANSWER


def test_a_search_is_made_once_for_a_placement_and_is_the_same_every_time(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specexec.drafters.skip.TRIES", 40)
    told: list[tuple[int, int]] = []
    searches: dict[str, NDArray[np.generic]] = {}

    def search(limits: Terms) -> Kept:
        return best_sublayers(
            case.target, limits, ASKED, "tiny", searches, lambda tried, most: told.append((tried, most))
        )

    limits = terms([True] * LAYERS)
    first_LS = search(limits)
    assert told
    assert told[-1][0] <= told[-1][1]
    told.clear()
    assert (search(limits) == first_LS).all()
    assert not told
    assert (best_sublayers(case.target, limits, ASKED, "tiny", {}) == first_LS).all()
    search(terms([False] * LAYERS))
    assert told
    assert len(searches) == 2


def test_what_was_kept_of_other_layers_is_searched_for_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specexec.drafters.skip.TRIES", 20)
    searches: dict[str, NDArray[np.generic]] = {}
    limits = terms([True] * LAYERS)
    wanted_LS = best_sublayers(case.target, limits, ASKED, "tiny", searches)
    (key,) = searches
    searches[key] = np.ones((LAYERS + 1, 2), np.uint8)
    assert (best_sublayers(case.target, limits, ASKED, "tiny", searches) == wanted_LS).all()


@pytest.mark.parametrize("tier", ["none", "disk"])
def test_the_command_keeps_what_it_found(
    tier: offload.Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path))
    monkeypatch.setattr("specexec.drafters.skip.TRIES", 24)
    told: list[int] = []
    answers = []
    for _ in range(2):
        earlier, progress = EarlierRuns(), LoadProgress(searched=lambda tried, most: told.append(tried))
        options = LoadOptions(drafter="skip", offload=tier, budget=8)
        with (
            searching(EngineOptions(model="demo"), earlier.searches),
            specexec.load("demo", options, progress=progress, earlier=earlier) as llm,
        ):
            answers.append(llm.generate("The following", SamplingParams(temperature=0.0, max_tokens=6)).tokens)
    assert told.count(24) == 1
    assert answers[0] == answers[1]
    with specexec.load("demo", drafter="none", offload=tier) as llm:
        assert llm.generate("The following", SamplingParams(temperature=0.0, max_tokens=6)).tokens == answers[0]


def test_drafting_goes_on_for_as_long_as_the_measured_acceptance_pays(case: Case) -> None:
    """What Draft & Verify's adaptive threshold is for, by calibration: the better the set, the deeper it drafts."""
    before, after = [], []
    for left_out in ((), (3, 1), (0, 1)):  # nothing; an MLP that is missed a little; one without which it knows nothing
        kept_LS = np.ones((LAYERS, 2), bool)
        if left_out:
            kept_LS[left_out] = False
        drafter = skipping(case.target, case.resident_layer, kept_LS, VOCABULARY)
        before.append(passes_of(drafter))
        for seed in range(3):
            write(case.target, drafter, [prompt(9, seed=seed)], replace(GREEDY, max_tokens=24), 8)
        after.append(passes_of(drafter))
    assert before[0] == before[1] == before[2]
    assert after[0] > after[1] > after[2]
    assert after[2] <= before[2]


def passes_of(drafter: SiblingDrafter) -> int:
    """Drafter passes for one tree where a pass costs a fiftieth of a sweep."""
    cost, made = CostModel(), 0
    for rows in (1, 64):
        cost.compute.learn(rows, 1000 + rows)
        cost.draft.learn(rows, 20 + rows)
    guess = drafter.guess

    def counted(asks: list[Ask], width: int) -> list[Guesses]:
        nonlocal made
        made += 1
        return guess(asks, width)

    drafter.guess = counted  # type: ignore[method-assign]
    BestFirst().grow(drafter, [sequence_of(TEXT, GREEDY)], AutoBudget(cost), cost)
    drafter.guess = guess  # type: ignore[method-assign]
    return made
