"""Text written with another verification rule, to be measured and discarded: it depends on the tree that was guessed.

Trees have a fixed shape, so many children for each node of a level: no rule but the walk allows a better one.
V vocabulary
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from specexec.evaluation.verification_rules import LOSSY, RULES, Coins, Found, Offer, block, bound, drawn
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.tree.tree import ROOT, Floats

BLOCK = "block"
OFFERED = {**RULES, **LOSSY}
NAMES = (*RULES, BLOCK, *LOSSY)
WIDTHS = (3, 2, 1, 1, 1, 1, 1, 1)  # children by level: 45 nodes
CHAIN = 16  # tokens of the one chain that block verification judges


@dataclass
class Tally:
    """What a rule came to. Of `judged` nodes it accepted a child at `taken`; no rule could at more than `most`."""

    tokens: int = 0
    sweeps: int = 0
    nodes: int = 0
    draft_s: float = 0.0
    seconds: float = 0.0
    depths: Counter[int] = field(default_factory=Counter)
    judged: int = 0
    taken: int = 0
    most: float = 0.0  # sum of alpha*, for children drawn with replacement


@dataclass
class _Proposal:
    """A guessed tree: its rows, and what was offered below each of them (ROOT too)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    offers: dict[int, Offer] = field(default_factory=dict)

    def add(self, node: int, offer: Offer) -> list[int]:
        """The new children of `node`; equal ones are one."""
        self.offers[node] = offer
        distinct = list(dict.fromkeys(offer.tokens))
        start = len(self.tokens)
        self.tokens += distinct
        self.parents += [node] * len(distinct)
        return list(range(start, start + len(distinct)))

    def child(self, node: int, token: int) -> int | None:
        found = [at for at, (parent, own) in enumerate(zip(self.parents, self.tokens, strict=True))
                 if parent == node and own == token]  # fmt: skip
        return found[0] if found else None


class RuleRunner:
    """A target and a drafter writing by one rule."""

    def __init__(
        self,
        target: TreeLM,
        draft: TreeLM,
        rule: str,
        temperature: float,
        seed: int,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        self._target, self._draft, self._rule, self._temperature = target, draft, rule, temperature
        self._widths = widths or ((1,) * CHAIN if rule == BLOCK else WIDTHS)
        self._coins: Coins = np.random.default_rng(seed)
        self.tally = Tally()

    def write(self, tokens: Items[int], count: int) -> list[int]:
        """`count` tokens after `tokens`."""
        text, caches = list(tokens), (KVCache(), KVCache())
        began = time.perf_counter()
        while len(text) < len(tokens) + count:
            text += self._sweep(text, *caches)
        self.tally.tokens += count
        self.tally.seconds += time.perf_counter() - began
        return text[len(tokens) : len(tokens) + count]

    def _sweep(self, text: list[int], target_cache: KVCache, draft_cache: KVCache) -> list[int]:
        began = time.perf_counter()
        proposal = self._propose(text[len(draft_cache) :], draft_cache)
        self.tally.draft_s += time.perf_counter() - began
        pending = text[len(target_cache) :]
        end = len(pending) - 1
        parents = [*range(-1, end), *(end if parent == ROOT else len(pending) + parent for parent in proposal.parents)]
        rows = Rows(target_cache, [*pending, *proposal.tokens], parents, len(pending))
        (hidden_RH,) = self._target.forward([rows])
        target_cache.commit(range(len(pending)))
        probs_MV = self._probs(self._target.head(hidden_RH[end:]))
        self.tally.sweeps += 1
        self.tally.nodes += len(proposal.tokens)
        written = self._chain(proposal, probs_MV) if self._rule == BLOCK else self._tree(proposal, probs_MV)
        self.tally.depths.update(range(len(written) - 1))
        return written

    def _propose(self, pending: list[int], cache: KVCache) -> _Proposal:
        """Level by level; the rows of the text first."""
        proposal, level, parents = _Proposal(), [ROOT], list(range(-1, len(pending) - 1))
        tokens, settled = pending, len(pending)
        for width in self._widths:
            (hidden_RH,) = self._draft.forward([Rows(cache, tokens, parents, settled)])
            settled = 0
            probs_NV = self._probs(self._draft.head(hidden_RH[-len(level) :]))
            below = [proposal.add(node, self._offer(q_V, width)) for node, q_V in zip(level, probs_NV, strict=True)]
            level = [child for children in below for child in children]
            tokens = [proposal.tokens[node] for node in level]
            above = (proposal.parents[node] for node in level)
            parents = [len(pending) - 1 if node == ROOT else len(pending) + node for node in above]
        cache.commit(range(len(pending)))
        return proposal

    def _offer(self, q_V: Floats, width: int) -> Offer:
        return drawn([q_V], self._coins) if self._rule == BLOCK else OFFERED[self._rule][0](q_V, width, self._coins)

    def _tree(self, proposal: _Proposal, probs_MV: Floats) -> list[int]:
        written: list[int] = []
        node: int | None = ROOT
        while node is not None:
            p_V, offer = probs_MV[node + 1], proposal.offers.get(node, Offer((), Found.FIXED, np.zeros((0, 0))))
            rule = OFFERED[self._rule][1] if offer.tokens else RULES["walk"][1]
            written.append(rule(p_V, offer, self._coins))
            if offer.tokens:
                self.tally.judged += 1
                self.tally.taken += written[-1] in offer.tokens
                if offer.found is Found.DRAWN:
                    self.tally.most += bound(p_V, offer.probs_KV[0], len(offer.tokens))
            node = proposal.child(node, written[-1])
        return written

    def _chain(self, proposal: _Proposal, probs_MV: Floats) -> list[int]:
        q_GV = np.stack([proposal.offers[node].probs_KV[0] for node in range(ROOT, len(proposal.tokens) - 1)])
        whole = Offer(tuple(proposal.tokens), Found.DRAWN, q_GV)
        return list(block(probs_MV[:-1], probs_MV[-1], whole, self._coins))

    def _probs(self, logits_NV: Tensor) -> Floats:
        """Both models' distributions over the ids that both have."""
        shared = min(self._target.vocabulary, self._draft.vocabulary)
        probs_NV: Floats = (logits_NV[:, :shared].double() / self._temperature).softmax(-1).cpu().numpy()
        return probs_NV / probs_NV.sum(-1, keepdims=True)
