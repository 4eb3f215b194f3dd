"""What the rows of a head read of a text: the target's hidden states at its taps, of the token before each.

For token t_i, i ≥ 1, that is what the target made of t_0 … t_{i-1}; t_0 has no row.
R rows   H hidden size   F features of a row   S tokens that a head names
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specexec.drafters.heads.self_check import SelfCheck
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import Tapped
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import CHUNK, HEAD_ROWS
from specexec.text.sequence import Sequence

Guessed = Callable[[Tensor, Items[int]], Iterator[Tensor]]
"""What a head guesses behind tokens of a text that follow each other, by the features of each: logits [R, S], some rows
at a time."""


class TextStates:
    """The states of a target at `taps`, side by side, that a head reads of texts.

    `joined` makes one row's features of those states, [R, taps * H] to [R, F]. `check` decides, by the first text that
    is long enough, where the states are to be read, or that this is a head of another model: it is `refused` then.
    """

    def __init__(
        self,
        target: TreeLM,
        taps: Items[int],
        named: Items[int],
        joined: Callable[[Tensor], Tensor] | None = None,
        check: SelfCheck | None = None,
    ) -> None:
        self._target, self._taps, self._named, self._joined = target, list(taps), named, joined
        self._check = check
        self.refused = False
        target.taps.want(self, taps, check.taps if check else ())

    def ready(self, sequence: Sequence) -> bool:
        """Whether the target has computed all of a text but its last token, and some of that is still there."""
        taken = sequence.cache(self._target).taken
        return taken is not None and taken.end == len(sequence.tokens) - 1 > taken.first(self._taps)

    def first(self, sequence: Sequence) -> int:
        """The first position whose states are there."""
        return self._of(sequence).first(self._taps)

    def settle(self, sequence: Sequence, guessed: Guessed) -> bool:
        """Decide where the states are read, if this text can tell; says whether that is elsewhere than before.

        Raises BadDrafter for a head of another model.
        """
        if self._check is None:
            return False
        tokens, taken = sequence.tokens, self._of(sequence)

        def along(taps: Items[int], first: int, end: int) -> Iterator[Tensor]:
            return guessed(self._side_by_side(taken, taps, first, end), tokens[first + 1 : end + 1])

        try:
            found = self._check.found(self._target, tokens, taken, along, self._named)
        except BadDrafter:
            self.refused = True
            self._target.taps.want(self, ())
            raise
        if found is None:
            return False
        self._check = None
        self._target.taps.want(self, found)
        before, self._taps = self._taps, list(found)
        return before != self._taps

    def between(self, sequence: Sequence, first: int, end: int) -> Tensor:
        """What rows read of the states at the positions `first` … `end` - 1, [R, F]."""
        return self._side_by_side(self._of(sequence), self._taps, first, end)

    def _of(self, sequence: Sequence) -> Tapped:
        taken = sequence.cache(self._target).taken
        assert taken is not None
        return taken

    def _side_by_side(self, taken: Tapped, taps: Items[int], first: int, end: int) -> Tensor:
        """Joined a chunk at a time."""
        chunks = list[Tensor]()
        with torch.no_grad(), self._target.linears():
            for at in range(first, end, CHUNK):
                states = [taken.between(tap, at, min(at + CHUNK, end)) for tap in taps]
                side_by_side = torch.cat(states, -1).to(self._target.device)
                chunks.append(side_by_side if self._joined is None else self._joined(side_by_side))
        return torch.cat(chunks)


class HeadFeatures:
    """The states of texts for the rows of the head `lm`, and which of the rows in its cache were computed from them.

    `logits`: what the hidden states of rows and their tokens say, where that is not its head's alone.
    """

    def __init__(
        self, lm: TreeLM, states: TextStates, logits: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self._lm, self._states, self._logits = lm, states, logits
        # Tokens whose rows were computed from the target's own states.
        self._true: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()

    @property
    def refused(self) -> bool:
        """Whether the head turned out to be of another model."""
        return self._states.refused

    def ready(self, sequence: Sequence) -> bool:
        """Whether anything can be guessed behind a text: its states are there."""
        return self._states.ready(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Where the states are read, if this text can tell. Raises BadDrafter for a head of another model."""
        if self._states.settle(sequence, self._guessed):
            for cache in self._true:
                self._true[cache] = 0

    def begin(self, sequence: Sequence) -> None:
        """Cut the head's cache back to rows that were computed from the target's own states.

        Where states in between are missing it begins anew where they begin. All rows to come will be of such states.
        """
        cache, first = sequence.cache(self._lm), self._states.first(sequence) + 1
        cache.rewind(min(len(cache), self._true.get(cache, len(cache))))
        if len(cache) < first:
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        self._true[cache] = len(sequence.tokens)

    def rows(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        """The next tokens of a text, and what each reads: the states of the one before it."""
        first = len(cache) - 1
        features_RF = self._states.between(sequence, first, first + len(tokens))
        return replace(Rows.text(cache, tokens), features_RF=features_RF)

    def below(self, sequence: Sequence, part: Rows, given_RH: Tensor) -> Rows:
        """Guesses read what came out of the head's own row of the parent."""
        return replace(part, features_RF=given_RH)

    def _guessed(self, features_RF: Tensor, tokens: Items[int]) -> Iterator[Tensor]:
        (hidden_RH,) = self._lm.forward([replace(Rows.text(KVCache(), tokens), features_RF=features_RF)])
        read_R = torch.tensor(tokens, device=hidden_RH.device)
        for few_RH, few_R in zip(hidden_RH.split(HEAD_ROWS), read_R.split(HEAD_ROWS), strict=True):
            yield self._lm.head(few_RH) if self._logits is None else self._logits(few_RH, few_R)
