"""A head guesses: layers that were trained to read the target's hidden states, and then their own in their place.

For a token of the text it reads what the target computed (features.py), for a guess what its own row of the parent
gave (EAGLE, Li et al. 2024). So rows of guesses that became text are as good as those guesses were: they are computed
again from the target's states as soon as the text is asked about again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

from torch import Tensor

from specexec.drafters.cascade import Cascade
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.protocol import Ask, Guesses, nothing
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Ints, TokenTree


class HeadDrafter(SiblingDrafter):
    """Guesses by a model whose rows have features: the target's states at `taps`, side by side, or its own output.

    `joined` and `check` are those of TextStates: a head that is refused guesses no more.
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
        named = range(lm.vocabulary) if ids is None else ids
        self._features = HeadFeatures(lm, TextStates(target, taps, named, joined, check))

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: nothing is read along."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """At most one forward pass; nothing for a text whose end the target has not computed yet."""
        ready = [ask for ask in asks if not self._features.refused and self._can_answer(ask)]
        for ask in ready:
            if ROOT in ask.nodes:
                self._features.settle(ask.sequence)
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
        return self._features.ready(ask.sequence)

    def _rows(self, ask: Ask) -> Rows:
        """The rows, and what each reads beside its token."""
        if ask.nodes == [ROOT]:
            self._features.begin(ask.sequence)
            part = super()._rows(ask)
            return self._text(ask.sequence, part.cache, part.tokens)
        part = super()._rows(ask)
        return replace(part, features_RF=self._below[ask.sequence].given(part.parents))

    def _text(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        return self._features.rows(sequence, cache, tokens)
