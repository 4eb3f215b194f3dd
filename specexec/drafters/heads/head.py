"""A head guesses: layers that were trained to read the target's hidden states, and then their own in their place.

For a token of the text it reads what the target computed (features.py), for a guess what its own row of the parent
gave (EAGLE, Li et al. 2024). So rows of guesses that became text are as good as those guesses were: they are computed
again from the target's states as soon as the text is asked about again.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from torch import Tensor

from specexec.drafters.cascade import Cascade
from specexec.drafters.protocol import Ask, Guesses, nothing
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import DraftLM, SiblingDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Ints, TokenTree


class RowFeatures(Protocol):
    """What the rows of a head read of a text and of its target (HeadFeatures, ReadFeatures)."""

    @property
    def refused(self) -> bool:
        """Whether this is a head of another model, which guesses no more."""
        ...

    def ready(self, sequence: Sequence) -> bool:
        """Whether the target has computed all of a text but its last token, and what is needed of that is there."""
        ...

    def settle(self, sequence: Sequence) -> None:
        """Find out what this text tells about the head. Raises BadDrafter for a head of another model."""
        ...

    def begin(self, sequence: Sequence) -> None:
        """The head's cache keeps what is as the target's own states make it; all rows to come will be of such."""
        ...

    def rows(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        """The next tokens of a text, and what each reads."""
        ...

    def below(self, sequence: Sequence, part: Rows, given_RH: Tensor) -> Rows:
        """Guesses, and what each reads: of its parent's row the hidden state `given_RH`."""
        ...


class HeadDrafter(SiblingDrafter):
    """Guesses by a model whose rows have `features`; one that they refuse guesses no more.

    `ids`: what the rows of its head stand for, where that is not 0, 1, 2, …
    """

    reads_its_own = True

    def __init__(
        self,
        lm: DraftLM,
        features: RowFeatures,
        vocabulary: int,
        ranking: Ranking | None = None,
        name: str = "mtp",
        never: Iterable[int] = (),
        ids: Items[int] | None = None,
        window: int | None = None,
    ) -> None:
        # No row can be read along: what a row reads has to be there, and its parent's is not before the pass.
        alone = Cascade(longest=0)
        super().__init__(lm, vocabulary, ranking, name, cascade=alone, never=never, ids=ids, window=window)
        self._features = features

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
        return self._features.below(ask.sequence, part, self._below[ask.sequence].given(part.parents))

    def _text(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        return self._features.rows(sequence, cache, tokens)
