"""A smaller model of the same family guesses. Its own tree cache holds one row for every node it was asked about.

N nodes   K children   V vocabulary
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from specexec.drafters import Ask, Guesses
from specexec.lm import Rows, TreeLM
from specexec.ranking import Ranking
from specexec.sampling import History
from specexec.sequence import Sequence
from specexec.tree import ROOT, TokenTree


class SiblingDrafter:
    """Guesses by any causal LM that shares the target's vocabulary of `vocabulary` ids."""

    def __init__(self, lm: TreeLM, vocabulary: int, ranking: Ranking | None = None, name: str = "sibling") -> None:
        self.name = name
        self.ranking = ranking or Ranking()
        self.context = lm.context
        self.lm = lm
        # Ids beyond the target's vocabulary are padding rows of the drafter's head: never guess them.
        self._vocabulary = min(lm.vocabulary, vocabulary)
        self._row_of_node: WeakKeyDictionary[Sequence, dict[int, int]] = WeakKeyDictionary()

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """One forward pass for all asked nodes of all sequences."""
        hidden = self.lm.forward([self._rows(ask) for ask in asks])
        logits = [self.lm.head(hidden_RH[-len(ask.nodes) :]) for ask, hidden_RH in zip(asks, hidden, strict=True)]
        return [self._best(ask, logits_NV, width) for ask, logits_NV in zip(asks, logits, strict=True)]

    def _rows(self, ask: Ask) -> Rows:
        """Rows to process; asking about ROOT brings the text up to date first."""
        sequence = ask.sequence
        cache = sequence.cache(self.lm)
        if ask.nodes == [ROOT]:
            cache.forget_nodes()
            pending = sequence.pending(self.lm)
            self._row_of_node[sequence] = {ROOT: len(pending) - 1}
            return Rows(cache, pending, range(-1, len(pending) - 1))
        row_of_node = self._row_of_node[sequence]
        first = len(cache.parents)
        parents = [row_of_node[int(ask.tree.parents_N[node])] for node in ask.nodes]
        row_of_node.update({node: first + i for i, node in enumerate(ask.nodes)})
        return Rows(cache, ask.tree.tokens_N[ask.nodes].tolist(), parents)

    def _best(self, ask: Ask, logits_NV: Tensor, width: int) -> Guesses:
        sequence, length = ask.sequence, len(ask.sequence.tokens)
        positions = [length if node == ROOT else length + 1 + int(ask.tree.depth_N[node]) for node in ask.nodes]
        histories: list[History] = []
        if sequence.sampling.penalised:
            above = sequence.history
            histories = [above.after(ask.tree.tokens_N[ask.tree.path(node)].tolist()) for node in ask.nodes]
        log_probs_NV = self.ranking.log_probs(
            logits_NV[:, : self._vocabulary], sequence.sampling, sequence.noise, positions, histories
        )
        best = log_probs_NV.topk(min(width, self._vocabulary))
        return Guesses(best.indices.cpu().numpy(), best.values.double().cpu().numpy())

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int]) -> None:
        """Keep the rows of the accepted path as far as this drafter was asked about it; drop the rest."""
        cache = sequence.cache(self.lm)
        row_of_child = {
            (parent, token): row
            for row, (parent, token) in enumerate(zip(cache.parents, cache.node_tokens, strict=True))
        }
        path: list[int] = []
        for token in sequence.tokens[len(cache) : -1]:
            row = row_of_child.get((path[-1] if path else ROOT, token))
            if row is None:
                break
            path.append(row)
        cache.commit(path)
