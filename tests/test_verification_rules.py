"""The other rules keep the target's distribution on the offers they are made for, refuse others, and rank as proved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from specexec.evaluation import verification_rules as rules
from specexec.evaluation.rule_runner import NAMES, RuleRunner
from specexec.evaluation.verification_rules import (
    LOSSY,
    RULES,
    Coins,
    Found,
    Offer,
    Rule,
    WrongOffer,
    block,
    bound,
    drawn,
    residual,
)
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.tree.tree import Floats
from tests.tiny import tiny
from tests.writing import prompt

WORDS, DEPTH, SAMPLES = 4, 2, 6000


def tables() -> tuple[Callable[[tuple[int, ...]], Floats], Callable[[tuple[int, ...]], Floats]]:
    """A made-up target and an unlike drafter: a distribution after every prefix."""
    generator = np.random.default_rng(4)
    prefixes = [prefix for length in range(DEPTH + 2) for prefix in product(range(WORDS), repeat=length)]
    target = {prefix: generator.dirichlet(np.full(WORDS, 0.8)) for prefix in prefixes}
    draft = {prefix: 0.5 * probs + 0.5 * generator.dirichlet(np.full(WORDS, 0.8)) for prefix, probs in target.items()}
    return target.__getitem__, draft.__getitem__


TARGET, DRAFT = tables()


def p_value(write: Callable[[tuple[int, ...], Coins], tuple[int, ...]]) -> float:
    """Chi-square of the first DEPTH tokens against the enumerated distribution; `write` gives what follows a prefix."""
    coins, counts = np.random.default_rng(7), np.zeros((WORDS,) * DEPTH)
    for _ in range(SAMPLES):
        text: tuple[int, ...] = ()
        while len(text) < DEPTH:
            text += write(text, coins)
        counts[text[:DEPTH]] += 1
    expected_counts = np.array([TARGET(())[a] * TARGET((a,))[b] for a in range(WORDS) for b in range(WORDS)]) * SAMPLES
    rare = expected_counts < 5
    observed, wanted = counts.ravel(), expected_counts
    observed, wanted = np.append(observed[~rare], observed[rare].sum()), np.append(wanted[~rare], wanted[rare].sum())
    return float(stats.chisquare(observed[wanted > 0], wanted[wanted > 0] * observed.sum() / wanted.sum()).pvalue)


def by_tree(offering: Callable[[Floats, int, Coins], Offer], rule: Rule, width: int = 2) -> float:
    """A tree of fixed shape, its offers made before the target is asked; followed as far as it goes."""

    def write(text: tuple[int, ...], coins: Coins) -> tuple[int, ...]:
        written: tuple[int, ...] = ()
        for _ in range(DEPTH):
            offer = offering(DRAFT((text + written)[:DEPTH]), width, coins)
            written += (rule(TARGET((text + written)[:DEPTH]), offer, coins),)
            if written[-1] not in offer.tokens:
                break
        return written

    return p_value(write)


def by_block(judge: Callable[[Floats, Floats, Offer, Coins], tuple[int, ...]], length: int = 2) -> float:
    def write(text: tuple[int, ...], coins: Coins) -> tuple[int, ...]:
        if text:  # only the first block matters for the distribution of DEPTH tokens, and a token behind it
            return (int(coins.choice(WORDS, p=TARGET(text))),)
        chain: tuple[int, ...] = ()
        for _ in range(length):
            chain += drawn([DRAFT(chain)], coins).tokens
        q_GV = np.stack([DRAFT(chain[:i]) for i in range(length)])
        p_GV = np.stack([TARGET(chain[:i]) for i in range(length)])
        return judge(p_GV, TARGET(chain), Offer(chain, Found.DRAWN, q_GV), coins)

    return p_value(write)


@pytest.mark.parametrize("name", RULES)
def test_the_text_has_the_target_s_distribution(name: str) -> None:
    assert by_tree(*RULES[name]) > 1e-4


def test_several_drafters_may_differ() -> None:
    def offering(q_V: Floats, width: int, coins: Coins) -> Offer:
        return drawn([q_V, np.full(WORDS, 1 / WORDS)], coins)

    assert by_tree(offering, rules.multi_step) > 1e-4


def test_a_block_has_the_target_s_distribution() -> None:
    assert by_block(block) > 1e-4


# Bugs such rules could have.


def residual_forgotten(p_V: Floats, offer: Offer, coins: Coins) -> int:
    for token, q_V in zip(offer.tokens, offer.probs_KV, strict=True):
        if coins.random() * q_V[token] < p_V[token]:
            return token
    return int(coins.choice(WORDS, p=p_V))


def only_the_last_residual(p_V: Floats, offer: Offer, coins: Coins) -> int:
    for token, q_V in zip(offer.tokens, offer.probs_KV, strict=True):
        if coins.random() * q_V[token] < p_V[token]:
            return token
    return int(coins.choice(WORDS, p=residual(p_V, offer.probs_KV[-1])))


def rejected_not_taken_out(p_V: Floats, offer: Offer, coins: Coins) -> int:
    return rules.multi_step(p_V, Offer(offer.tokens, Found.DRAWN, offer.probs_KV), coins)


def sure_children_as_if_drawn(p_V: Floats, offer: Offer, coins: Coins) -> int:
    for token in offer.tokens[:-1]:
        if coins.random() < p_V[token]:
            return token
    return rules.optimal_greedy(p_V, offer, coins)


MUTANTS = [
    ("multi-step", residual_forgotten),
    ("multi-step", only_the_last_residual),
    ("multi-step-distinct", rejected_not_taken_out),
    ("greedy", sure_children_as_if_drawn),
    ("greedy", residual_forgotten),
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_a_wrong_rule_is_caught(name: str, mutant: Rule) -> None:
    assert by_tree(RULES[name][0], mutant, width=3) < 1e-6


def test_ratios_on_fixed_children_are_caught_and_refused() -> None:
    """The hazard of reference codes: children chosen by rank, judged as if they had been drawn."""

    def ranked(q_V: Floats, width: int, coins: Coins) -> Offer:
        offer = rules.fixed(q_V, width)
        return Offer(offer.tokens, Found.DRAWN, np.repeat(q_V[None], width, axis=0))

    assert by_tree(ranked, rules.multi_step) < 1e-6
    for name, (offering, _) in RULES.items():
        offer = offering(DRAFT(()), 2, np.random.default_rng(0))
        for other, (_, rule) in RULES.items():
            if other in (name, "walk"):
                rule(TARGET(()), offer, np.random.default_rng(0))
            else:
                with pytest.raises(WrongOffer, match="is exact for"):
                    rule(TARGET(()), offer, np.random.default_rng(0))


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_rules_accept_more_and_change_the_distribution(name: str) -> None:
    assert by_tree(*LOSSY[name]) < 1e-6
    offering, rule = LOSSY[name]
    q_V, coins = DRAFT(()), np.random.default_rng(0)
    walked = [rules.walking(TARGET(()), rules.fixed(q_V, 2), coins) in rules.fixed(q_V, 2).tokens for _ in range(300)]
    judged = [rule(TARGET(()), offering(q_V, 2, coins), coins) in rules.fixed(q_V, 2).tokens for _ in range(300)]
    assert sum(judged) > sum(walked)


@pytest.mark.parametrize(
    ("rule", "child", "taken"),
    [  # the threshold of typical acceptance is 0.09 where the rest is sure, 0.3 exp(-ln 50) = 0.006 where it is flat
        (rules.typical, 0.1, True), (rules.typical, 0.08, False),
        (rules.relaxed, 0.25, True), (rules.relaxed, 0.15, False),
    ],
)  # fmt: skip
def test_the_thresholds_are_those_that_are_named(rule: Rule, child: float, taken: bool) -> None:
    p_V, coins = np.array([child, 1 - child]), np.random.default_rng(1)
    found = {rule(p_V, Offer((0,), Found.FIXED, np.zeros((0, 2))), coins) for _ in range(60)}
    assert (found == {0}) is taken
    flat_V = np.full(50, 0.02)
    assert rules.typical(flat_V, Offer((7,), Found.FIXED, np.zeros((0, 50))), coins) == 7


def test_trimming_to_the_best_nodes_is_caught() -> None:
    """Whether the second child is kept depends on which token the first one is: no rule can repair that."""

    def trimmed(q_V: Floats, width: int, coins: Coins) -> Offer:
        offer = drawn([q_V] * width, coins)
        keep = sorted(range(width), key=lambda child: -q_V[offer.tokens[child]])[:1]
        return Offer(tuple(offer.tokens[child] for child in keep), Found.DRAWN, offer.probs_KV[keep])

    assert by_tree(trimmed, rules.multi_step, width=3) < 1e-6


def unclipped(p_GV: Floats, last_V: Floats, chain: Offer, coins: Coins) -> tuple[int, ...]:
    """Every token by itself, but the residual of the whole block."""
    stands = 0
    for i, token in enumerate(chain.tokens):
        if coins.random() * chain.probs_KV[i, token] >= p_GV[i, token]:
            break
        stands = i + 1
    next_V = last_V if stands == len(chain.tokens) else p_GV[stands]
    return (*chain.tokens[:stands], int(coins.choice(WORDS, p=next_V)))


def test_a_wrong_block_is_caught() -> None:
    assert by_block(unclipped) < 1e-6


DISTRIBUTION = st.lists(st.floats(0.01, 1.0), min_size=WORDS, max_size=WORDS).map(
    lambda weights: np.array(weights) / sum(weights)
)


@settings(max_examples=60)
@given(DISTRIBUTION, DISTRIBUTION, st.integers(1, 3))
def test_the_bound_is_that_of_optimal_transport(p_V: Floats, q_V: Floats, width: int) -> None:
    """Maximise the mass of couplings between the target's token and a drawn tuple that holds it: a linear programme."""
    tuples = list(product(range(WORDS), repeat=width))
    chances = np.array([np.prod(q_V[list(one)]) for one in tuples])
    pairs = [(token, at) for at, one in enumerate(tuples) for token in set(one)]
    rows = np.zeros((WORDS + len(tuples), len(pairs)))
    for column, (token, at) in enumerate(pairs):
        rows[token, column] = rows[WORDS + at, column] = 1
    best = optimize.linprog(-np.ones(len(pairs)), A_ub=rows, b_ub=np.append(p_V, chances))
    assert bound(p_V, q_V, width) == pytest.approx(-best.fun, abs=1e-7)


def accepted(p_V: Floats, name: str, q_V: Floats, width: int, coins: Coins, samples: int = 400) -> float:
    offering, rule = RULES[name]
    offers = [offering(q_V, width, coins) for _ in range(samples)]
    return sum(rule(p_V, offer, coins) in offer.tokens for offer in offers) / samples


def test_rules_rank_as_proved() -> None:
    generator, coins = np.random.default_rng(1), np.random.default_rng(2)
    rates = dict.fromkeys(RULES, 0.0) | {"bound": 0.0}
    for _ in range(12):
        p_V = generator.dirichlet(np.full(8, 0.7))
        q_V = 0.6 * p_V + 0.4 * generator.dirichlet(np.full(8, 0.7))
        for name in RULES:
            rates[name] += accepted(p_V, name, q_V, 2, coins) / 12
        rates["bound"] += bound(p_V, q_V, 2) / 12
    assert rates["walk"] < rates["multi-step"] < rates["bound"] + 0.02
    assert rates["multi-step"] < rates["multi-step-distinct"] < rates["greedy"]


def test_every_rule_writes_and_a_perfect_drafter_is_taken_whole(tmp_path: Path) -> None:
    target, again = TreeLM(tiny("llama", tmp_path / "target")), TreeLM(tiny("llama", tmp_path / "again"))
    for name in NAMES:
        widths = (1, 1, 1) if name == "block" else (2, 2, 1)
        runner = RuleRunner(target, again, name, temperature=1.0, seed=1, widths=widths)
        assert len(runner.write(prompt(9), 12)) == runner.tally.tokens == 12
        if name.startswith("multi-step"):  # p = q: the first child is always accepted
            assert runner.tally.taken == runner.tally.judged == 3 * runner.tally.sweeps
        if name == "multi-step":
            assert runner.tally.most == pytest.approx(runner.tally.judged)
        if name == "block":
            assert runner.tally.depths[2] == runner.tally.sweeps == 3


def test_real_models_keep_the_target_s_distribution(tmp_path: Path) -> None:
    """The first two tokens of many seeds, guessed by an unlike drafter."""
    target = TreeLM(tiny("llama", tmp_path / "target", vocab_size=4, num_hidden_layers=1))
    off = TreeLM(tiny("llama", tmp_path / "off", seed=5, vocab_size=4, num_hidden_layers=1))
    text, samples = [1, 2, 3], 150
    rows = [[*text, token] for token in range(4)]
    hidden = target.forward([Rows(KVCache(), row, range(-1, 3)) for row in rows])
    first = RuleRunner(target, off, "walk", 1.5, 0)._probs(target.head(hidden[0][2:3]))[0]
    second = RuleRunner(target, off, "walk", 1.5, 0)._probs(target.head(torch.stack([one[3] for one in hidden])))
    for name in ("greedy", "block"):
        runner = RuleRunner(target, off, name, temperature=1.5, seed=3, widths=(1, 1) if name == "block" else (2, 1))
        seen = np.zeros((4, 4))
        for _ in range(samples):
            seen[tuple(runner.write(text, 2))] += 1
        wanted = (first[:, None] * second * samples).ravel()
        rare = wanted < 5
        merged = np.append(wanted[~rare], wanted[rare].sum() + 1e-9)
        observed = np.append(seen.ravel()[~rare], seen.ravel()[rare].sum() + 1e-9)
        assert stats.chisquare(observed, merged * observed.sum() / merged.sum()).pvalue > 1e-4
