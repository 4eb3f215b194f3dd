"""How likely given continuations are: many texts as trees, scored by one sweep. Knows no task and no file.

Nothing has to be guessed here, so one sweep is enough; texts that begin alike share the rows of their beginning, as
guesses about one text do.
R rows of one tree   P pairs of a row and the token after it   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specexec.engine.request_types import Continuation, Likelihood
from specexec.engine.together import MOST_ROWS
from specexec.model.cache import KVCache, common_prefix
from specexec.model.tree_lm import Rows
from specexec.sampling.verify import check_finite
from specexec.sizes import HEAD_ROWS
from specexec.tree.tree import ROOT

# A shorter beginning is cheaper to compute twice than to attend to across a tree of strangers.
WORTH_SHARING = 16


class ScoringTarget(Protocol):
    """What is needed of the model (lm.py, chain.py)."""

    def forward(self, parts: list[Rows]) -> list[Tensor]: ...

    def head(self, hidden_RH: Tensor) -> Tensor: ...


@dataclass(eq=False)
class _Tree:
    """Texts with a common beginning, one row for each different prefix; added in sorted order."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    asked: list[tuple[int, list[int], Items[int]]] = field(default_factory=list)  # index, rows, tokens after them
    text: list[int] = field(default_factory=list)  # the last one, and its rows
    path: list[int] = field(default_factory=list)

    def add(self, index: int, one: Continuation) -> None:
        """Put a text below what it shares with the one before it."""
        shared = common_prefix(self.text, one.read)
        del self.path[shared:]
        for token in one.read[shared:]:
            self.parents.append(self.path[-1] if self.path else ROOT)
            self.path.append(len(self.tokens))
            self.tokens.append(token)
        self.text = one.read
        self.asked.append((index, self.path[len(one.context) - 1 :], one.tokens))


def likelihoods(
    target: ScoringTarget, asked: Items[Continuation], fits: Callable[[list[int]], bool], branching: bool = True
) -> Iterator[tuple[int, Likelihood]]:
    """Every continuation's index and likelihood, sweep by sweep, texts with a common beginning side by side.

    `fits` says whether trees of so many rows each go into one sweep; a single text always does. Without `branching`
    (a target that takes no trees) a text shares rows only with one that it goes on. Raises BrokenLogits.
    """
    for index, one in enumerate(asked):
        if not one.tokens:
            yield index, Likelihood((), True)
    order = sorted((index for index, one in enumerate(asked) if one.tokens), key=lambda index: asked[index].read)
    trees: list[_Tree] = []
    for index in order:
        shared = common_prefix(trees[-1].text, asked[index].read) if trees else 0
        joins = bool(trees) and (shared == len(trees[-1].text) or (branching and shared >= WORTH_SHARING))
        new = len(asked[index].read) - (shared if joins else 0)
        sizes = [len(tree.tokens) for tree in trees]
        sizes = [*sizes[:-1], sizes[-1] + new] if joins else [*sizes, new]
        if trees and (sum(sizes) > MOST_ROWS or not fits(sizes)):
            yield from _sweep(target, trees)
            trees, joins = [], False
        if not joins:
            trees.append(_Tree())
        trees[-1].add(index, asked[index])
    if trees:
        yield from _sweep(target, trees)


@torch.no_grad()
def _sweep(target: ScoringTarget, trees: list[_Tree]) -> Iterator[tuple[int, Likelihood]]:
    hidden = target.forward([Rows(KVCache(), tree.tokens, tree.parents, _trunk(tree.parents)) for tree in trees])
    for tree, hidden_RH in zip(trees, hidden, strict=True):
        rows = [row for _, rows, _ in tree.asked for row in rows]
        tokens = [token for _, _, tokens in tree.asked for token in tokens]
        log_probs: list[float] = []
        likeliest: list[bool] = []
        for start in range(0, len(rows), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            tokens_P1 = torch.tensor(tokens[part], device=hidden_RH.device).unsqueeze(1)
            log_probs_PV = target.head(hidden_RH[rows[part]]).log_softmax(-1)
            best_P1 = log_probs_PV.max(-1, keepdim=True)
            check_finite(best_P1.values)
            log_probs += log_probs_PV.gather(1, tokens_P1).flatten().tolist()
            likeliest += (best_P1.indices == tokens_P1).flatten().tolist()
        done = 0
        for index, _, continuation in tree.asked:
            here = slice(done, done + len(continuation))
            yield index, Likelihood(tuple(log_probs[here]), all(likeliest[here]))
            done = here.stop


def _trunk(parents: list[int]) -> int:
    """How many rows there are before the first that something other than the next row hangs below."""
    return min((parent + 1 for row, parent in enumerate(parents) if parent != row - 1), default=len(parents))
