"""Likelihoods of given tokens: those of transformers' own forward, whatever shares a sweep and its rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from specexec.engine import likelihoods as scoring
from specexec.engine.likelihoods import likelihoods
from specexec.engine.request_types import Continuation, Likelihood
from specexec.errors import BrokenLogits
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import Rows, TreeLM
from tests.tiny import logits_of, tiny
from tests.writing import prompt

FAMILIES = ["llama", "gemma2", "mixtral"]  # plain, windows and soft-caps, experts


class Counted(TreeLM):
    """Remembers how many rows each sweep carried."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.sweeps: list[list[int]] = []

    def forward(self, parts: list[Rows], *more: object) -> list[torch.Tensor]:
        self.sweeps.append([len(part.tokens) for part in parts])
        return super().forward(parts, *more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, Counted]]:
    """A model of transformers', and the same one behind the scorer."""
    folder = tmp_path_factory.mktemp(request.param)
    target = Counted(tiny(request.param, folder))
    yield tiny(request.param, folder), target
    target.close()


def questions() -> list[Continuation]:
    """Four questions behind the same examples, each with several answers; strangers; one inside another; and none."""
    chance = random.Random(3)
    examples = prompt(40, seed=1)
    asked = [
        Continuation([*examples, *question], answer)
        for question in (prompt(5, seed=10 + n) for n in range(4))
        for answer in (prompt(chance.randrange(1, 6), seed=chance.randrange(99)) for _ in range(3))
    ]
    asked += [Continuation(prompt(chance.randrange(1, 30), seed=n), prompt(4, seed=n + 1)) for n in range(50, 54)]
    asked += [Continuation(examples[:20], examples[20:]), Continuation(examples[:1], ()), asked[0]]
    chance.shuffle(asked)
    return asked


def truth(model: PreTrainedModel, one: Continuation) -> Likelihood:
    """By a plain forward over the whole text."""
    whole = [*one.context, *one.tokens]
    log_probs_TV = logits_of(model, torch.tensor([whole]))[0].log_softmax(-1)
    at = range(len(one.context) - 1, len(whole) - 1)
    log_probs = [float(log_probs_TV[row, token]) for row, token in zip(at, one.tokens, strict=True)]
    return Likelihood(tuple(log_probs), [int(log_probs_TV[row].argmax()) for row in at] == list(one.tokens))


def check(model: object, asked: list[Continuation], found: dict[int, Likelihood]) -> None:
    assert isinstance(model, PreTrainedModel)
    assert sorted(found) == list(range(len(asked)))
    for index, one in enumerate(asked):
        expected = truth(model, one)
        assert found[index].log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert found[index].greedy == expected.greedy
        assert found[index].total == pytest.approx(sum(expected.log_probs), abs=1e-3)


def test_likelihoods_are_those_of_a_plain_forward(pair: tuple[object, Counted]) -> None:
    model, target = pair
    target.sweeps.clear()
    check(model, questions(), dict(likelihoods(target, questions(), lambda rows: True)))
    assert len(target.sweeps) == 1, "one sweep for everything"


def test_what_begins_alike_is_computed_once(pair: tuple[object, Counted]) -> None:
    _, target = pair
    asked = questions()
    target.sweeps.clear()
    dict(likelihoods(target, asked, lambda rows: True))
    prefixes = {tuple(one.read[: end + 1]) for one in asked if one.tokens for end in range(len(one.read))}
    shared = [rows for rows in target.sweeps[0] if rows > 40]
    assert len(shared) == 1, "all that goes on from the examples is one tree"
    assert sum(target.sweeps[0]) <= len(prefixes) + 4 * 16, "only beginnings too short to matter are computed twice"


def test_memory_decides_how_many_share_a_sweep(pair: tuple[object, Counted]) -> None:
    model, target = pair
    asked = questions()
    target.sweeps.clear()
    found = dict(likelihoods(target, asked, lambda rows: sum(rows) <= 64))
    check(model, asked, found)
    assert len(target.sweeps) > 2
    assert max(map(sum, target.sweeps)) <= 64
    target.sweeps.clear()
    dict(likelihoods(target, asked, lambda rows: False))
    assert len(target.sweeps) == sum(bool(one.tokens) for one in asked), "one text always goes into a sweep"


def test_no_sweep_is_larger_than_the_arithmetic_wants(
    pair: tuple[object, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, target = pair
    monkeypatch.setattr(scoring, "MOST_ROWS", 70)
    target.sweeps.clear()
    dict(likelihoods(target, questions(), lambda rows: True))
    assert max(map(sum, target.sweeps)) <= 70


def test_a_target_that_takes_no_trees_reads_chains(tmp_path: Path) -> None:
    target = ChainLM(tiny("llama", tmp_path))
    check(tiny("llama", tmp_path), questions(), dict(likelihoods(target, questions(), lambda rows: True, False)))
    target.close()


def test_a_greedy_continuation_is_known_as_one(pair: tuple[object, Counted]) -> None:
    model, target = pair
    assert isinstance(model, PreTrainedModel)
    text = prompt(12)
    best = int(logits_of(model, torch.tensor([text]))[0, -1].argmax())
    asked = [Continuation(text, [best]), Continuation(text, [(best + 1) % 256])]
    found = dict(likelihoods(target, asked, lambda rows: True))
    assert [found[0].greedy, found[1].greedy] == [True, False]


def test_broken_weights_give_no_likelihood(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    target = TreeLM(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(BrokenLogits):
        dict(likelihoods(target, questions(), lambda rows: True))
    target.close()
