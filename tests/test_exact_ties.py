"""`--exact`: where rounding decides between equal scores, the text is still one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import torch
from torch import Tensor

from cli.app import main
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.engine.decoder import Decoder
from specexec.model.exact_ties import ExactTies
from specexec.model.tree_lm import Rows, Sweep, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.sampling.scores import at_an_edge
from tests.tiny import tiny
from tests.writing import drafters, prompt, sequence_of

TREMBLE = 2e-6


class Trembling:
    """A target full of ties, whose last bits depend on the rows it was computed with."""

    def __init__(self, target: TreeLM) -> None:
        self.target = target
        self.sweeps = self.rows = 0

    def begin(self, parts: list[Rows]) -> Sweep:
        self.sweeps, self.rows = self.sweeps + 1, sum(len(part.tokens) for part in parts)
        return self.target.begin(parts)

    def head(self, hidden_RH: Tensor) -> Tensor:
        logits_RV = (self.target.head(hidden_RH) * 2).round() / 2
        for row, hidden_H in zip(logits_RV, hidden_RH, strict=True):
            seed = crc32(hidden_H.numpy().tobytes(), self.rows)
            row += TREMBLE * torch.randn(len(row), generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
        return logits_RV


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TreeLM, Drafter]:
    folder = tmp_path_factory.mktemp("trembling")
    return TreeLM(tiny("llama", folder / "target")), drafters("llama", folder)["sibling"]


def text(
    target: TreeLM, drafter: Drafter, budget: int, sampling: SamplingParams, exact: bool
) -> tuple[list[int], ExactTies]:
    trembling = Trembling(target)
    ties = ExactTies(trembling, torch.float32)
    planner = BestFirst(width=8)
    decoder = Decoder(trembling, drafter, planner, budget, overlap=False, exact_ties=ties if exact else None)
    sequence = sequence_of(prompt(12), sampling)
    decoder.join(sequence)
    while decoder.live:
        decoder.step()
    return sequence.answer, ties


def test_near_ties_flip_without_it_and_never_with_it(pair: tuple[TreeLM, Drafter]) -> None:
    target, drafter = pair
    flipped = 0
    for penalty in (1.0, 1.2):
        sampling = SamplingParams(temperature=0.0, repetition_penalty=penalty, max_tokens=20)
        plain, _ = text(target, NoDrafter(), 0, sampling, exact=False)
        flipped += text(target, drafter, 12, sampling, exact=False)[0] != plain
        exact, bill = text(target, NoDrafter(), 0, sampling, exact=True)
        assert 0 < bill.again < bill.choices, "ties are decided again, clear choices are not"
        assert 0 < bill.widest < 8 * TREMBLE
        for budget in (3, 12):
            assert text(target, drafter, budget, sampling, exact=True)[0] == exact
    assert flipped, "this target does not tremble enough to test anything"


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.7, "min_p": 0.02}], ids=str)
def test_no_filter_lets_a_token_in_by_rounding(pair: tuple[TreeLM, Drafter], filters: dict[str, float]) -> None:
    target, drafter = pair
    for seed in (1, 2):
        sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=20, **filters)  # type: ignore[arg-type]
        exact, bill = text(target, NoDrafter(), 0, sampling, exact=True)
        assert 0 < bill.again < bill.choices, "edges are decided again, clear choices are not"
        for budget in (3, 12):
            assert text(target, drafter, budget, sampling, exact=True)[0] == exact


def test_an_edge_is_seen_from_both_sides() -> None:
    quiet = Quiet()
    logits = torch.tensor([3.0, 2.0, 1.0, -5.0])
    for filters, near in (
        ({"top_k": 2}, torch.tensor([3.0, 1.0 + 1e-6, 1.0, -5.0])),
        ({"top_p": float(logits.softmax(-1)[:2].sum())}, logits),
        ({"min_p": math.exp(-2.0)}, logits),
    ):
        sampling = SamplingParams(temperature=1.0, **filters)
        assert at_an_edge(near, sampling, quiet, 0, unit=1e-5)
        far = torch.tensor([3.0, 2.0, 0.5, -5.0])
        assert not at_an_edge(far, sampling, quiet, 0, unit=1e-5)
        assert not at_an_edge(near, replace(sampling, temperature=0.0), quiet, 0, unit=1e-5)


class Quiet:
    """Noise that lets the third token win wherever it is let in."""

    def rows(self, positions: Iterable[int]) -> Tensor:
        return torch.tensor([[0.0, 0.0, 9.0, 0.0] for _ in positions])


def test_clear_choices_cost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("What is a tree?\n")
    asked = ["check", "--prompts", str(file), "-n", "12", "--dtype", "f32", "--offload", "none", "--exact"]
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert "exact: 0 of 24 choices were near-ties" in said
