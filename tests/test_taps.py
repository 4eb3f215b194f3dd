"""What flows into a target's layers, as drafters read it: that of a plain forward of transformers, however it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import offload
from offload.placement.placement import Offload
from specexec.errors import UnsupportedArchitecture
from specexec.model.cache import KVCache
from specexec.model.taps import LAST, Tapped
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.budget import FixedBudget
from specexec.sampling.params import SamplingParams
from specexec.sizes import TAPPED, TRIED_ROWS
from tests.tiny import LAYERS, tiny
from tests.writing import drafters, prompt, write

TAPS = (0, 1, 3, LAYERS, LAST)


def expected(model: torch.nn.Module, tokens: list[int]) -> dict[int, Tensor]:
    """By transformers itself; what it records last is behind the last norm."""
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    states = output.hidden_states
    return {tap: states[-1 if tap == LAST else tap][0] for tap in TAPS if tap != LAYERS}


@pytest.mark.parametrize(("family", "mode"), [("llama", "none"), ("gpt_oss", "disk")])
def test_taps_are_transformers_hidden_states(family: str, mode: Offload, tmp_path: Path) -> None:
    texts = [prompt(300, 1), prompt(40, 2), prompt(7, 3)]  # the first in chunks, and all in one sweep
    model = tiny(family, tmp_path)
    wanted = [expected(model, text) for text in texts]
    lm = TreeLM(offload.load(tmp_path, mode, dtype="f32"))
    lm.taps.want(lm, TAPS)
    parts = [Rows.text(KVCache(), text) for text in texts]
    lm.forward(parts)
    for part, own in zip(parts, wanted, strict=True):
        part.cache.commit(range(len(part.tokens)))
        taken = part.cache.taken
        assert taken is not None
        assert (taken.first(TAPS), taken.end) == (0, len(part.tokens))
        assert taken.states.keys() == set(TAPS)
        for tap, rows_PH in own.items():
            assert torch.allclose(taken.between(tap, 0, taken.end), rows_PH, atol=2e-4), tap
        normed_PH = lm.model.get_submodule("model.norm")(taken.states[LAYERS])
        assert torch.allclose(normed_PH, taken.states[LAST], atol=1e-4), "the last layer's, before the norm"
    lm.close()


def test_what_is_taken_of_guesses_is_that_of_the_text(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "plain")
    target = TreeLM(tiny("llama", tmp_path / "target"))
    target.taps.want(target, TAPS)
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=30)
    prompts = [prompt(21, seed) for seed in range(3)]
    for sequence in write(target, drafters("llama", tmp_path)["sibling"], prompts, sampling, 16):
        taken = sequence.caches[target].taken
        assert taken is not None
        assert (taken.first(TAPS), taken.end) == (0, len(sequence.caches[target]))
        for tap, rows_PH in expected(model, sequence.tokens[: taken.end]).items():
            assert torch.allclose(taken.states[tap], rows_PH, atol=2e-4)


def test_a_rewound_text_keeps_what_it_still_holds(tmp_path: Path) -> None:
    lm = TreeLM(tiny("llama", tmp_path))
    lm.taps.want(lm, [2])
    cache = KVCache()
    for text in (prompt(20), [5, 6]):
        lm.forward([Rows.text(cache, text)])
        cache.commit(range(len(text)))
    assert cache.taken is not None
    whole_PH = cache.taken.states[2]
    cache.rewind(9)
    assert torch.equal(cache.taken.states[2], whole_PH[:9])
    assert (copy := cache.prefix(4).taken) is not None
    assert torch.equal(copy.states[2], whole_PH[:4])
    cache.rewind(0)
    assert cache.taken is None
    assert not cache.tapped


def test_only_the_latest_are_kept_and_gaps_are_none() -> None:
    rows_PH = torch.arange(TAPPED + 5.0)[:, None]
    taken = Tapped(9, {1: rows_PH[:9]}).followed_by(Tapped(TAPPED + 5, {1: rows_PH[9:]}))
    assert (taken.first([1]), taken.end) == (5, TAPPED + 5)
    assert torch.equal(taken.between(1, 7, 9), rows_PH[7:9])
    late = taken.followed_by(Tapped(TAPPED + 9, {1: rows_PH[:2]}))
    assert (late.first([1]), late.end) == (TAPPED + 7, TAPPED + 9)


def test_each_tap_has_its_own_beginning() -> None:
    """One that is tried comes later and goes earlier than one that is wanted."""
    rows_PH = torch.arange(9.0)[:, None]
    both = Tapped(3, {1: rows_PH[:3]}).followed_by(Tapped(6, {1: rows_PH[3:6], 2: rows_PH[3:6]}))
    assert (both.first([1]), both.first([1, 2]), both.first([5])) == (0, 3, 6)
    assert torch.equal(both.between(2, 4, 6), rows_PH[4:6])
    assert (cut := both.until(3)) is not None
    assert cut.end == 3
    assert cut.states.keys() == {1}
    alone = both.followed_by(Tapped(9, {1: rows_PH[6:]}))
    assert torch.equal(alone.states[1], rows_PH)
    assert alone.states.keys() == {1}


def test_what_is_tried_is_recorded_in_short_sweeps_alone(tmp_path: Path) -> None:
    lm, reader = TreeLM(tiny("llama", tmp_path)), FixedBudget(1)
    lm.taps.want(lm, [1])
    lm.taps.want(reader, [2], [3, LAST])
    assert lm.taps.of(TRIED_ROWS) == {1, 2, 3, LAST}
    assert lm.taps.of(TRIED_ROWS + 1) == {1, 2}
    lm.taps.want(reader, [])
    assert lm.taps.of(1) == {1}


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    lm = TreeLM(tiny("llama", tmp_path))
    with pytest.raises(UnsupportedArchitecture, match=f"layer {LAYERS + 1} are asked for, and there are {LAYERS}"):
        lm.taps.want(lm, [LAYERS + 1])
