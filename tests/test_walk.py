"""The walk: whatever tree was guessed, it gives the text of plain decoding, which has the target's distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import BrokenLogits
from specexec.model.tree_lm import TreeLM
from specexec.sampling.noise import Noise, gumbel, philox_row
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, JudgedText, Processors
from specexec.sampling.verify import Opinion, walk
from specexec.tree.tree import ROOT, TokenTree
from tests.tiny import tiny
from tests.writing import prompt, write

WORDS = 6  # a toy vocabulary
START = 5


def table(prefix: tuple[int, ...]) -> Tensor:
    """A made-up model: logits as a fixed function of the whole prefix, [WORDS]."""
    generator = torch.Generator().manual_seed(hash(prefix) % 2**31)
    return torch.randn(WORDS, generator=generator) * 2


def opinion_of(tree: TokenTree, sampling: SamplingParams, noise: Noise) -> Opinion:
    """The made-up model's opinion of a tree: hidden states are the logits, the head hands them through."""
    prefixes = [(), *(tuple(tree.tokens[one] for one in tree.path(node)) for node in range(len(tree)))]
    hidden = torch.stack([table(prefix) for prefix in prefixes])
    return Opinion(lambda rows: rows, hidden, tree, START, sampling, noise)


def history_of(sampling: SamplingParams, answer: list[int]) -> History:
    return Processors(sampling, JudgedText((1, 2), WORDS)).history(answer)


def plain(length: int, sampling: SamplingParams, noise: Noise) -> list[int]:
    """One token at a time, no tree."""
    text: list[int] = []
    for _ in range(length):
        model = Opinion(
            lambda rows: rows, table(tuple(text))[None], TokenTree.empty(), START + len(text), sampling, noise
        )
        text.append(model.choice(ROOT, history_of(sampling, text)))
    return text


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any shape, any tokens, equal siblings included."""
    count = draw(st.integers(0, 40))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(count)]
    return TokenTree.of([draw(st.integers(0, WORDS - 1)) for _ in range(count)], parents)


@settings(max_examples=150)
@given(
    trees(),
    st.integers(0, 5),
    st.sampled_from(
        [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.8, top_k=3, top_p=0.8),
            SamplingParams(temperature=1.3, repetition_penalty=1.5, frequency_penalty=0.4),
            SamplingParams(temperature=0.0, presence_penalty=1.0),
        ]
    ),
)
def test_any_tree_gives_the_text_of_plain_decoding(tree: TokenTree, seed: int, sampling: SamplingParams) -> None:
    acceptance = walk(opinion_of(tree, sampling, Noise(seed, WORDS)), history_of(sampling, []))
    assert list(acceptance.tokens) == plain(len(acceptance.tokens), sampling, Noise(seed, WORDS))
    assert [tree.tokens[node] for node in acceptance.path] == list(acceptance.tokens[:-1])
    assert acceptance.path == tuple(tree.path(acceptance.path[-1]) if acceptance.path else ())


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=0.0, presence_penalty=1.0), SamplingParams(temperature=0.0, frequency_penalty=1.0)],
)
def test_a_token_that_was_accepted_in_this_tree_is_penalised_below_it(sampling: SamplingParams) -> None:
    """The model always likes token 3 best, by less than the penalty: after one 3 comes 4, whatever was guessed."""
    hidden = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.5, 0.0]]).expand(4, WORDS)
    tree = TokenTree.of([3, 3, 4], [ROOT, 0, 0])
    opinion = Opinion(lambda rows: rows, hidden, tree, START, sampling, Noise(0, WORDS))
    assert walk(opinion, history_of(sampling, [])).tokens[:2] == (3, 4)


def test_nan_is_an_error_and_not_a_text() -> None:
    hidden = torch.full((1, WORDS), torch.nan)
    with pytest.raises(BrokenLogits, match="not finite"):
        Opinion(lambda rows: rows, hidden, TokenTree.empty(), 0, SamplingParams(temperature=0.0), Noise(0, WORDS))


# The law of the first three tokens, against the enumerated one. The mutants are bugs such a verifier could have.

SAMPLES = 40_000  # the finest mutant has p < 1e-100
DEPTH = 3
TEMPERATURE = 0.9
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Tables:
    """Logits of the made-up target and of an unlike drafter after every prefix, [WORDS] * (depth + 1)."""

    def __init__(self) -> None:
        generator = np.random.default_rng(4)
        self.target = [generator.normal(0, 1.5, (WORDS,) * (depth + 1)) for depth in range(DEPTH)]
        self.draft = [table + generator.normal(0, 1.0, table.shape) for table in self.target]

    def law(self) -> Floats:
        """P of every text of three tokens, [WORDS, WORDS, WORDS]."""
        law = np.ones((WORDS,) * DEPTH)
        for depth, logits in enumerate(self.target):
            weights = np.exp(logits / TEMPERATURE)
            weights /= weights.sum(-1, keepdims=True)
            law = law * weights.reshape(weights.shape + (1,) * (DEPTH - 1 - depth))
        return law


@pytest.fixture(scope="module")
def noise() -> Floats:
    """[SAMPLES, DEPTH, WORDS]: a seed each."""
    bits = [[philox_row(seed, START + depth, WORDS) for depth in range(DEPTH)] for seed in range(SAMPLES)]
    return gumbel(np.array(bits, np.uint64))


def chosen(logits: Floats, noise: Floats) -> Ints:
    best: Ints = (logits + TEMPERATURE * noise).argmax(-1)
    return best


def ours(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen(tables.target[depth][tuple(text)], noise[:, depth])


def row_off_by_one(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen(tables.target[max(depth - 1, 0)][tuple(text[: max(depth - 1, 0)])], noise[:, depth])


def one_noise_for_all_positions(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen(tables.target[depth][tuple(text)], noise[:, 0])


def first_guess_unverified(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen((tables.target if depth else tables.draft)[depth][tuple(text)], noise[:, depth])


def last_token_from_the_draft(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen((tables.draft if depth == 2 else tables.target)[depth][tuple(text)], noise[:, depth])


def only_guessed_children(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    draft = tables.draft[depth][tuple(text)]
    guessed = draft >= np.sort(draft, -1)[..., -4:-3]
    return chosen(np.where(guessed, tables.target[depth][tuple(text)], -np.inf), noise[:, depth])


def another_temperature(tables: Tables, noise: Floats, depth: int, text: list[Ints]) -> Ints:
    return chosen(tables.target[depth][tuple(text)], noise[:, depth] * 1.1)


Verifier = Callable[[Tables, Floats, int, list[Ints]], Ints]


def p_value(verifier: Verifier, noise: Floats) -> float:
    """Chi-square of the joint law of three tokens; cells expecting fewer than five are merged."""
    tables, text = Tables(), list[Ints]()
    for depth in range(DEPTH):
        drawn = verifier(tables, noise, depth, text)
        text.append(np.broadcast_to(drawn, (SAMPLES,)))
    counts = np.zeros((WORDS,) * DEPTH)
    np.add.at(counts, tuple(text), 1)
    return merged_chi_square(counts.ravel(), tables.law().ravel() * SAMPLES)


def merged_chi_square(counts: Floats, expected: Floats) -> float:
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    wanted = wanted[keep] * observed[keep].sum() / wanted[keep].sum()
    return float(stats.chisquare(observed[keep], wanted).pvalue)


def test_the_text_has_the_enumerated_law(noise: Floats) -> None:
    assert p_value(ours, noise) > 1e-6


@pytest.mark.parametrize(
    "mutant",
    [
        row_off_by_one,
        one_noise_for_all_positions,
        first_guess_unverified,
        last_token_from_the_draft,
        only_guessed_children,
        another_temperature,
    ],
)
def test_a_wrong_verifier_is_caught(mutant: Verifier, noise: Floats) -> None:
    assert p_value(mutant, noise) < 1e-6


def test_a_real_model_writes_by_its_own_law(tmp_path: Path) -> None:
    """The first two tokens of 1000 seeds through the decoder, trees and batches included."""
    words, samples, text = 24, 1000, prompt(6, most=24)
    model = tiny("llama", tmp_path / "truth", vocab_size=words)
    target = TreeLM(tiny("llama", tmp_path / "target", vocab_size=words))
    unlike = TreeLM(tiny("llama", tmp_path / "unlike", vocab_size=words, seed=9, num_hidden_layers=1))
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, samples, 250):
        sampling = [SamplingParams(temperature=1.0, seed=seed, max_tokens=2) for seed in range(start, start + 250)]
        done = write(target, SiblingDrafter(unlike, words), [text] * 250, sampling, budget=3, vocabulary=words)
        counts.update(tuple(one.answer) for one in done)
    with torch.no_grad():
        first = model(torch.tensor([text])).logits[0, -1].double().softmax(-1)
        second = model(torch.tensor([[*text, token] for token in range(words)])).logits[:, -1].double().softmax(-1)
    law = (first[:, None] * second).numpy()
    seen = np.array([[counts[a, b] for b in range(words)] for a in range(words)], np.float64)
    assert merged_chi_square(seen.ravel(), law.ravel() * samples) > 1e-6
    assert merged_chi_square(seen.sum(1), law.sum(1) * samples) > 1e-6
    assert math.isclose(law.sum(), 1.0, rel_tol=1e-6)
    wrong = (first[:, None] * first).numpy()  # a verifier that reads the row before: such samples would show it
    assert merged_chi_square(seen.ravel(), wrong.ravel() * samples) < 1e-6
