"""A model that guesses several tokens in one pass: behind the text it reads masks, and each row guesses the next one.

PARD (An et al. 2025) trains an ordinary small model so, P-EAGLE (2026) an EAGLE-3 head, whose masks have features of
their own. Rows of masks are forgotten after the pass.   R rows   F features of a row
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specexec.drafters.heads.features import HeadFeatures
from specexec.drafters.heads.lattice import Filled
from specexec.drafters.sibling import catch_up
from specexec.model.tree_lm import Rows, TreeLM
from specexec.text.sequence import Sequence


@dataclass(frozen=True)
class MaskFeatures:
    """What a head's rows read beside tokens: of the text, and of every mask [F], if there are any."""

    text: HeadFeatures
    mask_F: Tensor | None = None


class Masks:
    """A model and the id of its mask; it guesses `places` tokens at once.

    With a `window` it sees the first tokens of a text and at least so many last ones.
    """

    def __init__(
        self, lm: TreeLM, mask: int, places: int, features: MaskFeatures | None = None, window: int | None = None
    ) -> None:
        self.context = lm.context
        self._lm, self._masks, self._places = lm, [mask] * (places - 1), places
        self._features, self._window = features, window

    def fill(self, sequence: Sequence) -> Filled | None:
        """One pass over what is new of the text, and the masks; None where a target has not read the text yet."""
        if self._features is not None:
            if self._features.text.refused or not self._features.text.ready(sequence):
                return None
            self._features.text.settle(sequence)
            self._features.text.begin(sequence)
        cache = sequence.cache(self._lm)
        cache.forget_nodes()

        def rows(tokens: Items[int]) -> Rows:
            if self._features is None:
                return Rows.text(cache, tokens)
            return self._features.text.rows(sequence, cache, tokens)

        catch_up(self._lm, sequence, cache, self._window, rows)
        text = rows(sequence.pending(self._lm))
        sure = len(text.tokens) - 1  # a cache never holds the last token
        masked = replace(
            text,
            tokens=[*text.tokens, *self._masks],
            parents=range(-1, sure + len(self._masks)),
            settled=sure,
            features_RF=self._with_masks(text.features_RF),
        )
        (hidden_RH,) = self._lm.forward([masked])
        cache.commit(range(sure))
        guessing_PH = hidden_RH[-self._places :]
        return Filled(self._lm.head(guessing_PH), guessing_PH)

    def _with_masks(self, text_RF: Tensor | None) -> Tensor | None:
        if text_RF is None or self._features is None or self._features.mask_F is None:
            return text_RF
        return torch.cat([text_RF, self._features.mask_F.expand(len(self._masks), -1)])
