"""Which experts the rows of a sweep are likely to visit, by their tokens. Knows no layer's weights and moves nothing.

A guess: rows of a token that was seen go where its last row went (an embedding decides much of a router's choice), and
others where most rows go. So what a drafter proposes says which experts to fetch before the router has spoken.
R rows   T tokens   K experts of each row   E experts of a layer
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from offload.checkpoint.routing import Routing

TOKENS = 4096  # whose choices are kept, the newest
FADE = 0.9  # of what a sweep has shown, with every newer one
LIKELY = 0.5  # a guess that is wrong more often brings more bytes than it saves waiting for


class LikelyExperts:
    """What was chosen lately, layer by layer."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # of tokens, the oldest first
        self._chosen_TK: dict[int, NDArray[np.int16]] = {}
        self._often_E: dict[int, NDArray[np.float64]] = {}  # the part of the rows that each expert had
        self._again: dict[int, float] = {}  # the chance that a row goes where the last one of its token went

    def learn(self, layer: int, tokens: Sequence[int], chosen_RK: NDArray[np.int64], routing: Routing) -> None:
        """Rows of these tokens were sent there; rows beyond them fill a tile, numbers beyond E mean no expert."""
        rows, K = min(len(tokens), len(chosen_RK)), chosen_RK.shape[1]
        if not rows:
            return  # all of them fill a tile
        own_RK = np.where(chosen_RK[:rows] < routing.experts, chosen_RK[:rows], -1)
        if layer not in self._chosen_TK:
            self._chosen_TK[layer] = np.full((TOKENS, K), -1, np.int16)
            self._often_E[layer] = np.bincount(own_RK[own_RK >= 0], minlength=routing.experts) / rows
            self._again[layer] = LIKELY
        known = [row for row, token in enumerate(tokens[:rows]) if token in self._places]
        places = [self._place(token) for token in tokens[:rows]]
        before_RK, after_RK = self._chosen_TK[layer][[places[row] for row in known]], own_RK[known]
        seen = (before_RK >= 0).any(1)
        if seen.any():
            again = (before_RK[seen][:, :, None] == after_RK[seen][:, None, :]).any(2).mean()
            self._again[layer] = FADE * self._again[layer] + (1 - FADE) * float(again)
        self._chosen_TK[layer][places] = own_RK
        often_E = np.bincount(own_RK[own_RK >= 0], minlength=routing.experts) / rows
        self._often_E[layer] = FADE * self._often_E[layer] + (1 - FADE) * often_E

    def of(self, tokens: Collection[int]) -> dict[int, list[int]]:
        """Of every layer the experts that such a sweep rather visits than not, the likeliest first."""
        if not self._often_E:
            return {}  # every sweep asks, of models without experts too
        known = [place for token in set(tokens) if (place := self._places.get(token)) is not None]
        return {layer: self._of_layer(layer, known, len(tokens) - len(known)) for layer in self._often_E}

    def _of_layer(self, layer: int, known: list[int], others: int) -> list[int]:
        """For rows of tokens at these places, one each, and so many others."""
        often_E, chosen = self._often_E[layer], self._chosen_TK[layer][known]
        seen_E = np.bincount(chosen[chosen >= 0], minlength=len(often_E))
        missed_E = (1 - self._again[layer]) ** seen_E * (1 - np.minimum(often_E, 1)) ** others
        likeliest = np.argsort(missed_E, kind="stable")
        return likeliest[: np.count_nonzero(missed_E < 1 - LIKELY)].tolist()

    def _place(self, token: int) -> int:
        """Where what a token chose is kept; that of the oldest one is given away."""
        if token not in self._places:
            full = len(self._places) == TOKENS
            self._places[token] = self._places.pop(next(iter(self._places))) if full else len(self._places)
            for chosen_TK in self._chosen_TK.values():
                chosen_TK[self._places[token]] = -1
        return self._places[token]
