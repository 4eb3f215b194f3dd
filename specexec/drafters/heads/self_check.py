"""Does a head read what it was trained on? Its guesses along the first text, compared with the target's own choices.

Files number the target's layers by two conventions under one name (eagle_fields.py), and a head may lie beside another
model than its own. Both cost guesses and nothing else, silently.
R rows   F features of a row   S tokens that the head names
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST, Tapped
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import HEAD_ROWS

LEAST, MOST = 24, 256  # rows that are compared
BETTER = 0.5  # nats a token by which another reading must be better
Features = Callable[[Tapped, Items[int], int, int], Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfCheck:
    """The readings of one head: the taps it is published with first, then those that may be meant instead."""

    name: str
    readings: tuple[tuple[int, ...], ...]

    @property
    def taps(self) -> frozenset[int]:
        """All that must be recorded to compare."""
        return frozenset((LAST, *(tap for taps in self.readings for tap in taps)))

    def found(
        self, lm: TreeLM, target: TreeLM, tokens: Items[int], taken: Tapped, features: Features, ids_S: Tensor | None
    ) -> tuple[int, ...] | None:
        """The best reading; None where a text has too few rows to tell.

        Raises BadDrafter where even that knows less of the target's choices than how often words occur in the text.
        """
        first = max(taken.first(self.taps), taken.end - 1 - MOST)
        rows = taken.end - 1 - first
        if rows < LEAST:
            return None
        named = range(lm.vocabulary) if ids_S is None else ids_S.tolist()
        row_of = {token: row for row, token in enumerate(named)}
        chosen = _choices(target, taken.between(LAST, first + 1, taken.end))
        at = [(place, row_of[token]) for place, token in enumerate(chosen) if token in row_of]
        if len(at) < LEAST // 2:
            return None
        read = tokens[first + 1 : taken.end]
        worth = {
            taps: _mean_log_probability(lm, read, features(taken, taps, first, taken.end - 1), at)
            for taps in self.readings
        }
        published, best = self.readings[0], max(self.readings, key=lambda taps: worth[taps])
        if worth[best] < worth[published] + BETTER:
            best = published
        frequency = _frequency(tokens, [named[row] for _, row in at], len(named))
        log.debug("%s along %d tokens, in nats: %s; frequency alone %.2f", self.name, len(at), worth, frequency)
        if not worth[best] > frequency:
            raise BadDrafter(
                f"the head {self.name} was not made for this model: along {len(at)} tokens of the text it knows less "
                f"of the model's choices ({worth[best]:.1f} nats a token) than how often words occur "
                f"({frequency:.1f}).",
                hint="the head of this very model, or --drafter ngram.",
            )
        if best != published:
            log.warning(
                "the head %s reads the states at %s, not at %s as its config.json is to be understood: so its guesses "
                "are better (%.1f nats a token, not %.1f).",
                self.name, list(best), list(published), worth[best], worth[published],
            )  # fmt: skip
        return best


def _choices(target: TreeLM, hidden_RH: Tensor) -> list[int]:
    """What the target chooses without noise."""
    return [int(one) for part in hidden_RH.split(HEAD_ROWS) for one in target.head(part).argmax(-1)]


def _mean_log_probability(lm: TreeLM, read: Items[int], features_RF: Tensor, at: Items[tuple[int, int]]) -> float:
    """Of the tokens that were chosen: row of the text, row of the head."""
    part = replace(Rows.text(KVCache(), read), features_RF=features_RF)
    (hidden_RH,) = lm.forward([part])
    places_N, rows_N = torch.tensor(at, device=hidden_RH.device).unbind(-1)
    found_N = [
        lm.head(hidden_NH).log_softmax(-1).gather(-1, rows_N1)
        for hidden_NH, rows_N1 in zip(
            hidden_RH[places_N].split(HEAD_ROWS), rows_N[:, None].split(HEAD_ROWS), strict=True
        )
    ]
    return float(torch.cat(found_N).mean())


def _frequency(tokens: Items[int], chosen: Items[int], named: int) -> float:
    """Mean log-probability of what was chosen by how often it occurs in the text, once more than it does."""
    counts = Counter(tokens)
    return sum(math.log((counts[one] + 1) / (len(tokens) + named)) for one in chosen) / len(chosen)
