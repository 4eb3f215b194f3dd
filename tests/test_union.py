"""Drafters joined: exact, no child twice, and the union learns whom to believe."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specexec.drafters.cost import CostModel, Line
from specexec.drafters.mixture import MemberGuesses, MixtureWeights, merge
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.union import Union
from specexec.engine.decoder import Decoder
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Ints, TokenTree
from tests.writing import TargetAndDrafters, plain_texts, prompt, samplings, sequence_of, write

LENGTH = 30
PROMPT = prompt(21)
SAMPLINGS = samplings(LENGTH)


class Script:
    """Answers every node with the same children, and writes down who was asked."""

    def __init__(self, chances: dict[int, float], context: int = 1000) -> None:
        self.name = "script"
        self.context = context
        self.asked: list[list[int]] = []
        self.kept: list[Ints | None] = []
        self._tokens, self._log_probs = list(chances), np.log(list(chances.values()))

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        self.asked += [ask.nodes for ask in asks]
        return [
            Guesses(np.array([self._tokens] * len(ask.nodes)), np.array([self._log_probs] * len(ask.nodes)))
            for ask in asks
        ]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        self.kept.append(kept)


class Dear(CostModel):
    """Seconds are so dear that the member asked first is worth asking down to `least` only, the others always."""

    first: Line | None = None
    least = -np.inf

    def floor(self, price: Line) -> float:
        self.first = self.first or price
        return self.least if price is self.first else -np.inf


def dear(least: float) -> CostModel:
    cost = Dear()
    cost.least = least
    return cost


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("floor", [None, -1.0])
@pytest.mark.parametrize("sampling", samplings(14), ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding(
    llama: TargetAndDrafters, sampling: SamplingParams, floor: float | None, overlap: bool
) -> None:
    ngram = NgramDrafter()
    for model in ("useless", "perfect"):
        union = Union([llama.drafters[model], ngram], None if floor is None else dear(floor))
        (sequence,) = write(llama.target, union, [PROMPT], sampling, 20, overlap=overlap)
        assert [sequence.answer] == plain_texts(llama.target, [PROMPT], sampling), model


def test_other_texts_change_nothing(llama: TargetAndDrafters) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 30)]
    alone = [write(llama.target, llama.drafters["none"], [tokens], SAMPLINGS[1])[0].answer for tokens in prompts]
    union = Union([llama.drafters["perfect"], NgramDrafter()], dear(-2.0))
    assert [one.answer for one in write(llama.target, union, prompts, SAMPLINGS[1], 20)] == alone


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_a_perfect_member_is_accepted_whole(llama: TargetAndDrafters, sampling: SamplingParams) -> None:
    decoder = Decoder(llama.target, Union([llama.drafters["confident"], NgramDrafter()]), BestFirst(), 9)
    decoder.join(sequence_of(PROMPT, sampling))
    for _ in range(3):
        (step,) = decoder.step()
        assert step.burst.accepted == 9


def ask(sequence: Sequence, tree: TokenTree | None = None, nodes: list[int] | None = None) -> list[Ask]:
    return [Ask(sequence, TokenTree.empty() if tree is None else tree, [ROOT] if nodes is None else nodes)]


def test_a_token_that_two_members_name_is_one_child() -> None:
    union = Union([Script({5: 0.5, 6: 0.25}), Script({6: 0.5, 7: 0.5})])
    (guesses,) = union.guess(ask(sequence_of([1], SAMPLINGS[0])), 8)
    likely = np.isfinite(guesses.log_probs_NK[0])
    assert sorted(guesses.tokens_NK[0][likely].tolist()) == [5, 6, 7]
    assert guesses.tokens_NK[0, 0] == 6
    assert guesses.origins_NK is not None
    named_by = dict(zip(guesses.tokens_NK[0].tolist(), guesses.origins_NK[0].tolist(), strict=True))
    assert [named_by[token] for token in (5, 6, 7)] == [0b01, 0b11, 0b10]
    assert np.exp(guesses.log_probs_NK).sum() == pytest.approx(0.875)  # believed equally: the mean of 0.75 and 1


def test_an_expensive_member_is_spared_the_unlikely_part() -> None:
    expensive, cheap = Script({5: 0.5, 6: 0.01}), Script({7: 0.5})
    union = Union([expensive, cheap], dear(np.log(0.1)))
    sequence = sequence_of([1], SAMPLINGS[0])
    union.guess(ask(sequence), 8)
    tree = TokenTree.of([5, 6, 5, 5], [ROOT, ROOT, 0, 1], np.log([0.5, 0.01, 0.3, 0.009]))
    union.guess(ask(sequence, tree, [0, 1]), 8)
    union.guess(ask(sequence, tree, [2, 3]), 8)
    assert expensive.asked == [[ROOT], [0], [2]]
    assert cheap.asked == [[ROOT], [0, 1], [2, 3]]


def test_while_decoding_does_not_wait_no_member_is_spared() -> None:
    expensive, cheap = Script({5: 0.5, 6: 0.01}), Script({7: 0.5})
    union, sequence = Union([expensive, cheap], dear(np.log(0.1))), sequence_of([1], SAMPLINGS[0])
    union.guess(ask(sequence), 8)
    tree = TokenTree.of([5, 6], [ROOT, ROOT], np.log([0.5, 0.01]))
    union.guess([Ask(sequence, tree, [0, 1], waited=False)], 8)
    assert expensive.asked == cheap.asked == [[ROOT], [0, 1]]


def test_a_node_that_pays_for_no_member_goes_to_those_that_know_it() -> None:
    one, other = Script({5: 0.5}), Script({7: 0.5})
    cost = dear(np.log(0.1))
    cost.floor = lambda price: np.log(0.1)  # type: ignore[method-assign]
    union, sequence = Union([one, other], cost), sequence_of([1], SAMPLINGS[0])
    union.guess(ask(sequence), 8)
    tree = TokenTree.of([5, 7], [ROOT, ROOT], np.log([0.5, 0.01]))
    (guesses,) = union.guess(ask(sequence, tree, [0, 1]), 8)
    assert one.asked == other.asked == [[ROOT], [0, 1]]
    assert np.isfinite(guesses.log_probs_NK).any(1).all()
    assert MixtureWeights().weights((0, 6, 6)).tolist() == [0.5, 0.5]


def test_a_member_with_a_short_context_is_not_asked_beyond_it() -> None:
    short, long = Script({5: 0.5}, context=3), Script({5: 0.5})
    union = Union([short, long])
    assert union.context == 1000
    sequence = sequence_of([1, 2], SAMPLINGS[0])
    union.guess(ask(sequence), 8)
    union.guess(ask(sequence, TokenTree.of([5], [ROOT]), [0]), 8)
    assert short.asked == [[ROOT]]
    assert long.asked == [[ROOT], [0]]


def test_a_member_that_was_right_gets_weight() -> None:
    mixture = MixtureWeights()
    cell = (0, 3, 3)
    assert mixture.weights(cell) == pytest.approx([0.5, 0.5])
    for _ in range(60):
        mixture.learn(cell, np.array([0.7, 0.0]), 1.0)
    assert mixture.weights(cell)[0] > 0.9
    assert mixture.weights((0, 3, 4))[0] < 0.5  # another degree of sureness is another matter


def test_an_absent_member_has_no_weight() -> None:
    assert MixtureWeights().weights((0, 2, 6)).tolist() == [1.0, 0.0]


CHILDREN = st.dictionaries(st.integers(0, 6), st.floats(0.01, 0.2), max_size=4)


@given(st.lists(st.lists(CHILDREN, min_size=2, max_size=2), min_size=1, max_size=3))
def test_merging_keeps_every_chance_and_names_each_token_once(said: list[list[dict[int, float]]]) -> None:
    told = [_told(member) for member in said]
    together = merge(told)
    for node in range(2):
        tokens = [token for token in together.tokens_NK[node].tolist() if token >= 0]
        assert sorted(tokens) == sorted({token for member in said for token in member[node]})
        for member, chances_NK in enumerate(together.chances_MNK):
            named = zip(together.tokens_NK[node].tolist(), chances_NK[node].tolist(), strict=True)
            assert {token: chance for token, chance in named if chance} == pytest.approx(said[member][node])


def _told(rows: list[dict[int, float]]) -> MemberGuesses:
    width = max(map(len, rows))
    tokens_NK = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64).reshape(len(rows), width)
    chances_NK = np.array([[*row.values(), *[0.0] * (width - len(row))] for row in rows]).reshape(len(rows), width)
    with np.errstate(divide="ignore"):
        return MemberGuesses.of(tokens_NK, np.log(chances_NK))
