"""A head guesses: layers that were trained to read the target's hidden states, and then their own in their place.

For token t_i of the text, i ≥ 1, it reads what the target made of t_0 … t_{i-1}; t_0 has no row. For a guess it reads
what its own row of the parent gave (EAGLE, Li et al. 2024). So rows of guesses that became text are as good as those
guesses were: they are computed again from the target's states as soon as the text is asked about again.
N nodes   R rows   H hidden size   F features of a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specexec.drafters.cascade import Cascade
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.protocol import Ask, Guesses, nothing
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import Tapped
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import CHUNK
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Ints, TokenTree


class HeadDrafter(SiblingDrafter):
    """Guesses by a model whose rows have features: the target's states at `taps`, side by side, or its own output.

    `joined` makes one row's features of those states, [R, taps * H] to [R, F]. `check` decides, by the first text that
    is long enough, where the states are to be read, or that this is a head of another model: it guesses no more then.
    `ids`: what the rows of its head stand for, where that is not 0, 1, 2, …
    """

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
        joined: Callable[[Tensor], Tensor] | None = None,
        ids: Items[int] | None = None,
        check: SelfCheck | None = None,
        window: int | None = None,
    ) -> None:
        # No row can be read along: what a row reads has to be there, and its parent's is not before the pass.
        alone = Cascade(longest=0)
        super().__init__(lm, vocabulary, ranking, name, cascade=alone, never=never, ids=ids, window=window)
        self._target, self._taps, self._joined, self._check = target, list(taps), joined, check
        self._refused = False
        target.taps.want(self, taps, check.taps if check else ())
        # Tokens whose rows were computed from the target's own states.
        self._true: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: nothing is read along."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """At most one forward pass; nothing for a text whose end the target has not computed yet."""
        ready = [ask for ask in asks if not self._refused and self._can_answer(ask)]
        for ask in ready:
            if ROOT in ask.nodes:
                self._settle(ask.sequence)
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
        return taken is not None and taken.end == len(ask.sequence.tokens) - 1 > taken.first(self._taps)

    def _taken(self, sequence: Sequence) -> Tapped | None:
        return sequence.cache(self._target).taken

    def _settle(self, sequence: Sequence) -> None:
        """Where the states are read, if this text can tell. Raises BadDrafter for a head of another model."""
        check, taken = self._check, self._taken(sequence)
        if check is None:
            return
        assert taken is not None
        try:
            found = check.found(self.lm, self._target, sequence.tokens, taken, self._features, self._ids_S)
        except BadDrafter:
            self._refused = True
            self._target.taps.want(self, ())
            raise
        if found is None:
            return
        self._check = None
        self._target.taps.want(self, found)
        if list(found) != self._taps:
            self._taps = list(found)
            for cache in self._true:
                self._true[cache] = 0

    def _rows(self, ask: Ask) -> Rows:
        """The rows, and what each reads beside its token."""
        sequence = ask.sequence
        if ask.nodes != [ROOT]:
            part = super()._rows(ask)
            return replace(part, features_RF=self._below[sequence].given(part.parents))
        taken = self._taken(sequence)
        assert taken is not None
        cache, first = sequence.cache(self.lm), taken.first(self._taps) + 1
        cache.rewind(min(len(cache), self._true.get(cache, len(cache))))
        if len(cache) < first:  # states in between are missing: begin anew where they begin
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        part = super()._rows(ask)
        self._true[cache] = len(cache) + part.settled
        return self._text(sequence, cache, list(part.tokens))

    def _text(self, sequence: Sequence, cache: KVCache, tokens: list[int]) -> Rows:
        """The next tokens of a text, and what each reads: the states of the one before it."""
        taken, first = self._taken(sequence), len(cache) - 1
        assert taken is not None
        features_RF = self._features(taken, self._taps, first, first + len(tokens))
        return replace(super()._text(sequence, cache, tokens), features_RF=features_RF)

    def _features(self, taken: Tapped, taps: Items[int], first: int, end: int) -> Tensor:
        """What rows read of the states at the positions `first` … `end` - 1, [R, F]; joined a chunk at a time."""
        chunks = list[Tensor]()
        with torch.no_grad(), self.lm.linears():
            for at in range(first, end, CHUNK):
                states = [taken.between(tap, at, min(at + CHUNK, end)) for tap in taps]
                side_by_side = torch.cat(states, -1).to(self.lm.device)
                chunks.append(side_by_side if self._joined is None else self._joined(side_by_side))
        return torch.cat(chunks)
