"""How many of a layer's experts a sweep visits, and when it pays to fetch those alone. Numbers, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offload.checkpoint.documents import Json

# What configs call the experts of a layer, and those of them that a token is sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_k", "top_k_experts")
# A layer waits while its experts are fetched on demand: less than a quarter saved is not worth it.
WORTH = 0.75
FADE = 0.995  # of a sample's weight with every newer one; a sweep gives one for each layer


@dataclass(frozen=True)
class Routing:
    """Each row is sent to `chosen` of the `experts` of a layer; n rows visit what n ** `alike` free ones would."""

    experts: int
    chosen: int
    alike: float = 1.0

    def touched(self, rows: ArrayLike) -> NDArray[np.float64]:
        """Experts that so many rows are expected to visit: E (1 - (1 - k / E) ** (n ** alike)).

        >>> [float(Routing(16, 2, alike).touched(4)) for alike in (1.0, 0.5)]
        [6.62109375, 3.75]
        """
        missed = (1 - self.chosen / self.experts) ** (np.asarray(rows, dtype=np.float64) ** self.alike)
        return np.asarray(self.experts * (1 - missed))

    def on_demand(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Should a sweep over so many rows fetch experts once they are chosen, not all of them ahead?"""
        return np.asarray(self.touched(rows) <= WORTH * self.experts)

    @property
    def many(self) -> int:
        """The fewest rows for which all experts come ahead."""
        rows = 1
        while self.on_demand(rows):
            rows += 1
        return rows

    def share(self, rows: ArrayLike) -> NDArray[np.float64]:
        """The part of the experts' bytes that such a sweep is expected to bring."""
        return np.where(self.on_demand(rows), self.touched(rows) / self.experts, 1.0)


DENSE = Routing(1, 1)


@dataclass
class Visits:
    """How alike the rows of sweeps choose, learned from the experts that they visited.

    One number for all layers: the slope of log(rows that choose freely and visit as many) over log(rows), through the
    origin, since one row visits `chosen`. Until anything is known no expert is a favourite.
    """

    usual: Routing
    _sums: NDArray[np.float64] = field(default_factory=lambda: np.full(2, log(16) ** 2))  # as if 16 rows had been seen

    def learn(self, rows: int, visited: int) -> None:
        """So many rows of a sweep were sent to so many of one layer's experts."""
        experts, chosen = self.usual.experts, self.usual.chosen
        least = min(visited, experts - 0.5)  # all of them say only that there are not more
        if rows > 1 and chosen < experts and (least == visited or self.routing.touched(rows) < least):
            free = max(log(1 - least / experts) / log(1 - chosen / experts), 1.0)
            self._sums = FADE * self._sums + np.array([log(rows) * log(free), log(rows) ** 2])

    @property
    def routing(self) -> Routing:
        """What sweeps to come are expected to do."""
        return replace(self.usual, alike=float(self._sums[0] / self._sums[1]))


def routing_of(config: Mapping[str, Json]) -> Routing | None:
    """What config.json says about experts; None for a model without."""
    experts, chosen = (_first(config, names) for names in (EXPERTS, CHOSEN))
    return Routing(experts, min(chosen, experts)) if experts and chosen else None


def _first(config: Mapping[str, Json], names: tuple[str, ...]) -> int:
    """The first of these numbers that the config has; zero if it has none."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)
