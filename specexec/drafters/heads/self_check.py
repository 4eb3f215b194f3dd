"""Does a head read what it was trained on? Its guesses along the first text, compared with the target's own choices.

Files number the target's layers by two conventions under one name (eagle_fields.py), and a head may lie beside another
model than its own. Both cost guesses and nothing else, silently.   R rows   S tokens that the head names
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.errors import BadDrafter
from specexec.model.taps import LAST, Tapped
from specexec.model.tree_lm import TreeLM
from specexec.sizes import HEAD_ROWS

LEAST, MOST = 24, 256  # rows that are compared
BETTER = 0.5  # nats a token by which another reading must be better
Along = Callable[[Items[int], int, int], Iterator[Tensor]]
"""Logits [R, S], some rows at a time, by the states of these taps at the positions `first` … `end` - 1: what the head
guesses behind the token that follows each of them."""

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
        self, target: TreeLM, tokens: Items[int], taken: Tapped, along: Along, named: Items[int]
    ) -> tuple[int, ...] | None:
        """The best reading of a head that names these tokens; None where a text has too few rows to tell.

        Raises BadDrafter where even that knows less of the target's choices than how often words occur in the text.
        """
        first = max(taken.first(self.taps), taken.end - 1 - MOST)
        rows = taken.end - 1 - first
        if rows < LEAST:
            return None
        row_of = {token: row for row, token in enumerate(named)}
        chosen = _choices(target, taken.between(LAST, first + 1, taken.end))
        at = [(place, row_of[token]) for place, token in enumerate(chosen) if token in row_of]
        if len(at) < LEAST // 2:
            return None
        worth = {taps: _mean_log_probability(along(taps, first, taken.end - 1), at) for taps in self.readings}
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


def _mean_log_probability(logits: Iterator[Tensor], at: Items[tuple[int, int]]) -> float:
    """Of the tokens that were chosen: row of the text, row of the head."""
    rows_of: dict[int, int] = dict(at)
    first, total = 0, 0.0
    for logits_RS in logits:
        here = [(place - first, rows_of[place]) for place in range(first, first + len(logits_RS)) if place in rows_of]
        if here:
            places_N, rows_N = torch.tensor(here, device=logits_RS.device).unbind(-1)
            total += float(logits_RS[places_N].float().log_softmax(-1).gather(-1, rows_N[:, None]).sum())
        first += len(logits_RS)
    return total / len(at)


def _frequency(tokens: Items[int], chosen: Items[int], named: int) -> float:
    """Mean log-probability of what was chosen by how often it occurs in the text, once more than it does."""
    counts = Counter(tokens)
    return sum(math.log((counts[one] + 1) / (len(tokens) + named)) for one in chosen) / len(chosen)
