"""A drafter that fails costs its guesses and is said once, never an answer; what must pass passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from specexec.drafters.auto import failures
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine.decoder import Decoder
from specexec.model.tree_lm import TreeLM
from specexec.planning.baselines import Beam, Sequoia
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.text.sequence import Sequence
from specexec.tree.tree import Ints, TokenTree
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, sequence_of, write

pytestmark = pytest.mark.drafter_fails
SAMPLING = SamplingParams(temperature=0.8, seed=3, max_tokens=24)
PROMPTS = [prompt(12), prompt(7, 2), prompt(30, 3)]


class Failing:
    """A good drafter that raises at its n-th call of one method, for ever after, or says something absurd."""

    name = "failing"

    def __init__(self, inside: Drafter, method: str, error: Callable[[], BaseException], after: int = 3) -> None:
        self.inside, self.context = inside, inside.context
        self._method, self._error, self._left = method, error, after
        self.calls = 0

    def _fail(self, method: str) -> None:
        if method == self._method:
            self.calls += 1
            self._left -= 1
            if self._left < 0:
                raise self._error()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        self._fail("at_hand")
        return self.inside.at_hand(asks)

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        self._fail("guess")
        return self.inside.guess(asks, width)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        self._fail("observe")
        self.inside.observe(sequence, tree, choices_M, kept)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TreeLM:
    return TreeLM(tiny("llama", tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def perfect(target: TreeLM, tmp_path_factory: pytest.TempPathFactory) -> TreeLM:
    return TreeLM(tiny("llama", tmp_path_factory.mktemp("perfect")))


@pytest.fixture(scope="module")
def plain(target: TreeLM) -> list[list[int]]:
    return [one.answer for one in write(target, NgramDrafter(), PROMPTS, SAMPLING, budget=0)]


@pytest.mark.parametrize(
    ("method", "error"),
    [("at_hand", KeyError), ("guess", ZeroDivisionError), ("observe", lambda: RuntimeError("device-side assert"))],
    ids=["at_hand", "guess", "observe"],
)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_whatever_it_raises_costs_guesses_only(
    target: TreeLM, perfect: TreeLM, plain: list[list[int]], caplog: pytest.LogCaptureFixture,
    method: str, error: Callable[[], Exception], joined: bool,
) -> None:  # fmt: skip
    drafter: Drafter = Failing(SiblingDrafter(perfect, VOCABULARY), method, error)
    with caplog.at_level(logging.WARNING, "specexec"):
        texts = write(target, Union([drafter, NgramDrafter()]) if joined else drafter, PROMPTS, SAMPLING, budget=16)
    assert [one.answer for one in texts] == plain
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the drafter failing failed and is left out where it did")
    assert type(error()).__name__ in said


@pytest.mark.parametrize("planner", [BestFirst(), Beam(), Sequoia()], ids=["best", "beam", "sequoia"])
def test_every_planner_goes_on_without_it(
    target: TreeLM, perfect: TreeLM, plain: list[list[int]], planner: BestFirst | Beam | Sequoia
) -> None:
    drafter = Failing(SiblingDrafter(perfect, VOCABULARY), "guess", ZeroDivisionError)
    texts = write(target, drafter, PROMPTS, SAMPLING, budget=16, planner=planner)
    assert [one.answer for one in texts] == plain


def test_it_is_left_alone_for_those_texts_and_asked_again_about_others(target: TreeLM, perfect: TreeLM) -> None:
    drafter = Failing(SiblingDrafter(perfect, VOCABULARY), "guess", ZeroDivisionError, after=0)
    decoder = Decoder(target, drafter, BestFirst(), 8)
    decoder.join(sequence_of(PROMPTS[0], SAMPLING))
    while decoder.live:
        decoder.step()
    assert drafter.calls == 1
    assert failures(decoder.guarded) == {"failing": "ZeroDivisionError: "}
    drafter._left = 10**9
    decoder.join(sequence_of(PROMPTS[1], SAMPLING))
    accepted = 0
    while decoder.live:
        accepted += sum(step.burst.accepted for step in decoder.step())
    assert accepted > SAMPLING.max_tokens / 2


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt, MemoryError, lambda: torch.OutOfMemoryError("CUDA out of memory"),
     lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_interrupts_and_refused_memory_pass(
    target: TreeLM, perfect: TreeLM, error: Callable[[], BaseException]
) -> None:
    drafter = Failing(SiblingDrafter(perfect, VOCABULARY), "guess", error, after=0)
    with pytest.raises(type(error())):
        write(target, drafter, PROMPTS, SAMPLING)


@pytest.mark.parametrize("token", [VOCABULARY, 10**9, -1])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_ids_without_a_row_never_reach_the_target(
    target: TreeLM, plain: list[list[int]], token: int, joined: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Strange(NgramDrafter):
        name = "strange"

        def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
            return [Guesses(np.full((len(ask.nodes), 1), token), np.full((len(ask.nodes), 1), -0.1)) for ask in asks]

    drafter: Drafter = Union([Strange(), NgramDrafter()]) if joined else Strange()
    assert [one.answer for one in write(target, drafter, PROMPTS, SAMPLING, budget=16)] == plain
    assert not caplog.records


@pytest.mark.parametrize("shape", [(0, 1), (3, 2)], ids=["too few", "too many"])
def test_answers_of_the_wrong_shape_are_a_failure(
    target: TreeLM, plain: list[list[int]], shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    class Misshapen(NgramDrafter):
        name = "misshapen"

        def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
            return [Guesses(np.zeros(shape, np.int64), np.zeros(shape)) for _ in asks]

    assert [one.answer for one in write(target, Misshapen(), PROMPTS, SAMPLING, budget=16)] == plain
    assert "children of every node" in caplog.text


def test_a_drafter_with_broken_weights_changes_no_text(target: TreeLM, plain: list[list[int]], tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    for drafter in (
        SiblingDrafter(TreeLM(model), VOCABULARY),
        Union([SiblingDrafter(TreeLM(model), VOCABULARY), NgramDrafter()]),
    ):
        assert [one.answer for one in write(target, drafter, PROMPTS, SAMPLING, budget=16)] == plain
