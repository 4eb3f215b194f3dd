"""What the rows of a head read of a text: the target's hidden states at its taps, of the token before each.

For token t_i, i ≥ 1, that is what the target made of t_0 … t_{i-1}; t_0 has no row.
R rows   H hidden size   F features of a row   S tokens that the head names
"""

from __future__ import annotations

from collections.abc import Callable
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
from specexec.sizes import CHUNK
from specexec.text.sequence import Sequence


class HeadFeatures:
    """The states of a target at `taps`, side by side, for the rows of the head `lm`.

    `joined` makes one row's features of those states, [R, taps * H] to [R, F]. `check` decides, by the first text that
    is long enough, where the states are to be read, or that this is a head of another model: it is `refused` then.
    `ids_S`: what the rows of its head stand for, where that is not 0, 1, 2, …
    """

    def __init__(
        self,
        lm: TreeLM,
        target: TreeLM,
        taps: Items[int],
        joined: Callable[[Tensor], Tensor] | None = None,
        check: SelfCheck | None = None,
        ids_S: Tensor | None = None,
    ) -> None:
        self._lm, self._target, self._taps, self._joined = lm, target, list(taps), joined
        self._check, self._ids_S = check, ids_S
        self.refused = False
        target.taps.want(self, taps, check.taps if check else ())
        # Tokens whose rows were computed from the target's own states.
        self._true: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()

    def ready(self, sequence: Sequence) -> bool:
        """Whether the target has computed all of a text but its last token, and some of that is still there."""
        taken = self._taken(sequence)
        return taken is not None and taken.end == len(sequence.tokens) - 1 > taken.first(self._taps)

    def settle(self, sequence: Sequence) -> None:
        """Where the states are read, if this text can tell. Raises BadDrafter for a head of another model."""
        check, taken = self._check, self._taken(sequence)
        if check is None:
            return
        assert taken is not None
        try:
            found = check.found(self._lm, self._target, sequence.tokens, taken, self._side_by_side, self._ids_S)
        except BadDrafter:
            self.refused = True
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

    def begin(self, sequence: Sequence) -> None:
        """Cut the head's cache back to rows that were computed from the target's own states.

        Where states in between are missing it begins anew where they begin. All rows to come will be of such states.
        """
        cache, taken = sequence.cache(self._lm), self._taken(sequence)
        assert taken is not None
        first = taken.first(self._taps) + 1
        cache.rewind(min(len(cache), self._true.get(cache, len(cache))))
        if len(cache) < first:
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        self._true[cache] = len(sequence.tokens)

    def rows(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        """The next tokens of a text, and what each reads: the states of the one before it."""
        taken, first = self._taken(sequence), len(cache) - 1
        assert taken is not None
        features_RF = self._side_by_side(taken, self._taps, first, first + len(tokens))
        return replace(Rows.text(cache, tokens), features_RF=features_RF)

    def below(self, sequence: Sequence, part: Rows, given_RH: Tensor) -> Rows:
        """Guesses read what came out of the head's own row of the parent."""
        return replace(part, features_RF=given_RH)

    def _taken(self, sequence: Sequence) -> Tapped | None:
        return sequence.cache(self._target).taken

    def _side_by_side(self, taken: Tapped, taps: Items[int], first: int, end: int) -> Tensor:
        """What rows read of the states at the positions `first` … `end` - 1, [R, F]; joined a chunk at a time."""
        chunks = list[Tensor]()
        with torch.no_grad(), self._lm.linears():
            for at in range(first, end, CHUNK):
                states = [taken.between(tap, at, min(at + CHUNK, end)) for tap in taps]
                side_by_side = torch.cat(states, -1).to(self._lm.device)
                chunks.append(side_by_side if self._joined is None else self._joined(side_by_side))
        return torch.cat(chunks)
