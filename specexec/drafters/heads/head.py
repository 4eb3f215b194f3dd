"""A head guesses: layers that were trained to read the target's hidden states, and then their own in their place.

For token t_i of the text, i ≥ 1, it reads what the target made of t_0 … t_{i-1}; t_0 has no row. For a guess it reads
what its own row of the parent gave (EAGLE, Li et al. 2024). So rows of guesses that became text are as good as those
guesses were: they are computed again from the target's states as soon as the text is asked about again.
N nodes   R rows   H hidden size   F features of a row
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from specexec.drafters.cascade import Cascade
from specexec.drafters.protocol import Ask, Guesses, nothing
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import Tapped
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Ints, TokenTree


class HeadDrafter(SiblingDrafter):
    """Guesses by a model whose rows have features: the target's states at `taps`, side by side, or its own output."""

    reads_its_own = True

    def __init__(
        self,
        lm: TreeLM,
        target: TreeLM,
        taps: Items[int],
        vocabulary: int,
        ranking: Ranking | None = None,
        name: str = "mtp",
        never: Iterable[int] = (),
    ) -> None:
        # No row can be read along: what a row reads has to be there, and its parent's is not before the pass.
        super().__init__(lm, vocabulary, ranking, name, cascade=Cascade(longest=0), never=never)
        self._target, self._taps = target, list(taps)
        target.taps.add(taps)
        # Tokens whose rows were computed from the target's own states.
        self._true: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: nothing is read along."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """At most one forward pass; nothing for a text whose end the target has not computed yet."""
        ready = [ask for ask in asks if self._can_answer(ask)]
        said = dict(zip(map(id, ready), super().guess(ready, width) if ready else [], strict=True))
        return [said.get(id(ask)) or nothing(ask) for ask in asks]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Learn, and move on with the text, if anything was guessed below it."""
        if sequence in self._below:
            super().observe(sequence, tree, choices_M, kept)

    def _can_answer(self, ask: Ask) -> bool:
        if ROOT not in ask.nodes:
            return ask.sequence in self._below
        self._below.pop(ask.sequence, None)
        taken = self._taken(ask.sequence)
        return taken is not None and taken.end == len(ask.sequence.tokens) - 1

    def _taken(self, sequence: Sequence) -> Tapped | None:
        return sequence.cache(self._target).taken

    def _rows(self, ask: Ask) -> Rows:
        """The rows, and what each reads beside its token."""
        sequence = ask.sequence
        if ask.nodes != [ROOT]:
            part = super()._rows(ask)
            return replace(part, features_RF=self._below[sequence].given(part.parents))
        taken = self._taken(sequence)
        assert taken is not None
        cache, first = sequence.cache(self.lm), taken.first + 1
        cache.rewind(min(len(cache), self._true.get(cache, len(cache))))
        if len(cache) < first:  # states in between are missing: begin anew where they begin
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        part = super()._rows(ask)
        self._true[cache] = len(cache) + part.settled
        end = len(sequence.tokens) - 1
        states = [taken.between(tap, end - part.settled, end) for tap in self._taps]
        return replace(part, features_RF=torch.cat(states, -1).to(self.lm.device))
