"""Other verification rules, to compare the walk with; `specexec bench --rules` measures them (rule_runner.py).

They draw random numbers as they go, so the same seed gives another text with another tree: no user's text is written
with them.

Each of RULES is exact in distribution for the offers it was made for: it says what it needs and refuses the rest; those
of LOSSY change the text on purpose. In
a tree of such offers the shape must not depend on which tokens were drawn (trimming to the best nodes biases it).
V vocabulary   K children of one node   G length of a chain
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np

from specexec.errors import SpecexecError
from specexec.tree.tree import Floats

Coins: TypeAlias = np.random.Generator


class WrongOffer(SpecexecError):
    """This rule would bias the text for children that were found so."""

    code = "wrong_offer"


class Found(Enum):
    """How the children of a node were found."""

    FIXED = "fixed"  # any way that draws nothing: the likeliest, retrieved, ranked by shared noise
    DRAWN = "drawn"  # independently, each from its own distribution; equal ones may come
    DISTINCT = "distinct"  # one after another from one distribution, without replacement
    GREEDY = "greedy"  # the likeliest K - 1, and one drawn from the rest


@dataclass(frozen=True)
class Offer:
    """The children of one node, in the order in which they were found, and what each was drawn from, [K, V].

    For DISTINCT every row is the drafter's whole distribution; for GREEDY only the last row counts; FIXED has none.
    """

    tokens: tuple[int, ...]
    found: Found
    probs_KV: Floats


def fixed(q_V: Floats, width: int) -> Offer:
    """The `width` likeliest children."""
    tokens = np.argsort(-q_V, kind="stable")[:width]
    return Offer(tuple(tokens.tolist()), Found.FIXED, np.zeros((0, len(q_V))))


def drawn(probs: Items[Floats], coins: Coins) -> Offer:
    """A child from each of several distributions: one drafter asked often, or several asked once."""
    tokens = tuple(int(coins.choice(len(q_V), p=q_V)) for q_V in probs)
    return Offer(tokens, Found.DRAWN, np.stack(probs))


def distinct(q_V: Floats, width: int, coins: Coins) -> Offer:
    """Children drawn without replacement; as many as have a chance at all."""
    width = min(width, int((q_V > 0).sum()))
    tokens = coins.choice(len(q_V), size=width, replace=False, p=q_V, shuffle=False)
    return Offer(tuple(tokens.tolist()), Found.DISTINCT, np.repeat(q_V[None], width, axis=0))


def greedy(q_V: Floats, width: int, coins: Coins) -> Offer:
    """The likeliest `width` - 1 children, and one drawn from what is left."""
    sure = np.argsort(-q_V, kind="stable")[: width - 1]
    rest_V = without(q_V, sure.tolist())
    last = [int(coins.choice(len(q_V), p=rest_V))] if rest_V.any() else []
    return Offer((*sure.tolist(), *last), Found.GREEDY, np.repeat(rest_V[None], len(sure) + len(last), axis=0))


def walking(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """Draw from the target and see whether it was guessed (SpecExec 2024). The best there is for FIXED children."""
    _check(offer, Found.FIXED, Found.DRAWN, Found.DISTINCT, Found.GREEDY)  # what it draws knows nothing of the offer
    return int(coins.choice(len(p_V), p=p_V))


def multi_step(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """Accept child after child with min(1, p / q), p becoming its residual (SpecInfer, Miao et al. 2024, theorem 4.2).

    With one drafter asked K times it is MCSD with replacement (Yang et al. 2024).
    """
    _check(offer, Found.DRAWN)
    for token, q_V in zip(offer.tokens, offer.probs_KV, strict=True):
        if coins.random() * q_V[token] < p_V[token]:
            return token
        p_V = residual(p_V, q_V)
    return int(coins.choice(len(p_V), p=p_V))


def multi_step_distinct(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """The same without replacement: a rejected child is taken out of q too (MCSD, Yang et al. 2024)."""
    _check(offer, Found.DISTINCT)
    gone: list[int] = []
    for token, whole_V in zip(offer.tokens, offer.probs_KV, strict=True):
        q_V = without(whole_V, gone)
        if coins.random() * q_V[token] < p_V[token]:
            return token
        p_V = residual(p_V, q_V)
        gone.append(token)
    return int(coins.choice(len(p_V), p=p_V))


def optimal_greedy(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """The optimal rule for greedy offers (Hu et al. 2025): the drawn child with min(1, p / q), else a draw from what is
    left of p once q is taken away."""
    _check(offer, Found.GREEDY)
    if not offer.tokens:
        return int(coins.choice(len(p_V), p=p_V))
    token, q_V = offer.tokens[-1], offer.probs_KV[-1]
    if q_V[token] and coins.random() * q_V[token] < p_V[token]:
        return token
    return int(coins.choice(len(p_V), p=residual(p_V, q_V)))  # q is 0 at the sure children: p stays whole there


Rule: TypeAlias = Callable[[Floats, Offer, Coins], int]

# By name: how the children are found, given the drafter's distribution, and who judges them.
RULES: dict[str, tuple[Callable[[Floats, int, Coins], Offer], Rule]] = {
    "walk": (lambda q_V, width, _: fixed(q_V, width), walking),
    "multi-step": (lambda q_V, width, coins: drawn([q_V] * width, coins), multi_step),
    "multi-step-distinct": (distinct, multi_step_distinct),
    "greedy": (greedy, optimal_greedy),
}


def typical(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """Accept the likeliest child whose chance is at least min(0.09, 0.3 exp(-entropy)) (Medusa, Cai et al. 2024)."""
    sure_V = p_V[p_V > 0]
    entropy = -float((sure_V * np.log(sure_V)).sum())
    return _likely_enough(p_V, offer, coins, min(0.09, 0.3 * float(np.exp(-entropy))))


def relaxed(p_V: Floats, offer: Offer, coins: Coins) -> int:
    """Accept the likeliest child whose chance is at least 0.2, whatever the others': a fixed threshold."""
    return _likely_enough(p_V, offer, coins, 0.2)


def _likely_enough(p_V: Floats, offer: Offer, coins: Coins, threshold: float) -> int:
    _check(offer, Found.FIXED)
    best = max(offer.tokens, key=lambda token: float(p_V[token]), default=None)
    return best if best is not None and p_V[best] >= threshold else int(coins.choice(len(p_V), p=p_V))


# The same of rules that change the distribution of the text: to see what they would gain.
LOSSY: dict[str, tuple[Callable[[Floats, int, Coins], Offer], Rule]] = {
    "typical": (lambda q_V, width, _: fixed(q_V, width), typical),
    "relaxed": (lambda q_V, width, _: fixed(q_V, width), relaxed),
}


def block(p_GV: Floats, last_V: Floats, chain: Offer, coins: Coins) -> tuple[int, ...]:
    """The accepted part of a drawn chain, and one token more: all its tokens judged together (Sun et al. 2025, alg. 2).

    Row i of `p_GV` and of the chain's `probs_KV` are the target's and the drafter's distributions of token i, `last_V`
    the target's after the whole chain. No rule for one chain accepts more.
    """
    _check(chain, Found.DRAWN)
    q_GV, length = chain.probs_KV, len(chain.tokens)
    weights, accepted = [1.0], 0
    for i, token in enumerate(chain.tokens):
        weights.append(min(weights[-1] * p_GV[i, token] / q_GV[i, token], 1.0))
    for i in range(1, length + 1):
        if i == length:
            accept = weights[i]
        else:
            left = np.maximum(weights[i] * p_GV[i] - q_GV[i], 0.0).sum()
            accept = left / (left + 1.0 - weights[i]) if left else 0.0
        if coins.random() < accept:
            accepted = i
    next_V = last_V if accepted == length else residual(weights[accepted] * p_GV[accepted], q_GV[accepted])
    return (*chain.tokens[:accepted], int(coins.choice(len(next_V), p=next_V)))


def bound(p_V: Floats, q_V: Floats, width: int) -> float:
    """alpha*: the most that any rule can accept of `width` children drawn from q with replacement (Hu et al. 2025).

    min over sets H of p(H) + 1 - q(H)^width; the best H is a prefix of the tokens sorted by p / q.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(np.where(q_V > 0, p_V / q_V, np.inf), kind="stable")
    p_H = np.concatenate([[0.0], np.cumsum(p_V[order])])
    q_H = np.concatenate([[0.0], np.cumsum(q_V[order])])
    return float(np.min(p_H + 1.0 - q_H**width))


def residual(p_V: Floats, q_V: Floats) -> Floats:
    """(p - q)+ as a distribution; p itself where nothing is left, which then is never needed."""
    left_V = np.maximum(p_V - q_V, 0.0)
    return np.asarray(left_V / left_V.sum() if left_V.sum() > 1e-300 else p_V / p_V.sum())


def without(q_V: Floats, tokens: Items[int]) -> Floats:
    """q given that it is none of these tokens; all zeros if nothing else has a chance."""
    left_V = q_V.copy()
    left_V[list(tokens)] = 0.0
    total = left_V.sum()
    return np.asarray(left_V / total) if total > 0 else left_V


def _check(offer: Offer, *fits: Found) -> None:
    if offer.found not in fits:
        wanted = " or ".join(one.value for one in fits)
        raise WrongOffer(
            f"this rule is exact for {wanted} children, these are {offer.found.value}.",
            why="Accepting them by it would change the distribution of the text.",
            hint="the walk: it is exact for any tree.",
        )
