"""The head's weights are read once for the texts of a sweep, and once for a text whose choices are filtered."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specexec.drafters.none import NoDrafter
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from specexec.sampling.shared_head import logits_of_texts
from specexec.sizes import HEAD_ROWS
from tests.tiny import tiny
from tests.writing import prompt, write


@settings(max_examples=100)
@given(st.lists(st.integers(1, 2 * HEAD_ROWS), max_size=12))
def test_every_text_has_its_own_logits_and_no_call_has_more_rows_than_fit(counts: list[int]) -> None:
    called: list[int] = []

    def head(hidden_RH: Tensor) -> Tensor:
        called.append(len(hidden_RH))
        return hidden_RH * 2

    rows = [torch.full((count, 1), float(text)) for text, count in enumerate(counts)]
    found = list(logits_of_texts(head, rows))
    assert len(found) == len(rows)
    for own, logits in zip(rows, found, strict=True):
        assert (logits is None) == (len(own) > HEAD_ROWS)
        assert logits is None or torch.equal(logits, own * 2)
    assert sum(called) == sum(count for count in counts if count <= HEAD_ROWS)
    assert all(count <= HEAD_ROWS for count in called)


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8}], ids=["greedy", "top-p"])
def test_plain_sweeps_of_several_texts_call_the_head_once(
    values: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TreeLM(tiny("llama", tmp_path))
    calls: list[int] = []
    sweeps: list[int] = []
    own_head, own_sweep = target.head, target.forward

    def head(hidden_RH: Tensor) -> Tensor:
        calls.append(len(hidden_RH))
        return own_head(hidden_RH)

    def sweep(parts: list[Rows], cancelled: Event | None = None) -> list[Tensor]:
        sweeps.append(len(parts))
        return own_sweep(parts, cancelled)

    monkeypatch.setattr(target, "head", head)
    monkeypatch.setattr(target, "forward", sweep)
    sampling = SamplingParams(**values, max_tokens=6, seed=1)  # type: ignore[arg-type]
    write(target, NoDrafter(), [prompt(5, seed) for seed in range(3)], sampling, budget=0)
    assert calls == sweeps == [3] * len(sweeps)
