"""States in RAM: a layer's states arrive before it computes; they and what its nodes keep go back afterwards.

While one layer computes, the states of the next are on their way, and those of the layer before go home: three layers'
are where the computation is. A path that was committed is followed there, when its layer is visited next. What goes
where is decided here, a `Carrier` moves it. Knows no device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.model.cache_in_ram import Travel
from specexec.model.recurrent.memory import LayerMemory, Memories, NodeVectors, Shelf

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StatePassenger:
    """One sequence of a sweep: its memories at home, and nodes that these have from earlier sweeps."""

    memories: Memories
    nodes: int


class StateTrip:
    """One sweep: what a layer has `here`, layer by layer in order; `finish` after the last one. Nothing moves any more
    once the trip of keys and values, which the same carrier carries, has ended.
    """

    def __init__(
        self, travel: Travel, recurrent: Iterable[int], passengers: Items[StatePassenger], device: torch.device
    ) -> None:
        self._carrier, self._passengers, self._device = travel.carrier, passengers, device
        self._route = sorted(layer for layer in recurrent if travel.with_states and layer in travel.layers)
        self._at: int | None = None
        self._here: list[Memories] = []
        self._coming: tuple[int, list[Memories]] | None = None
        self._leaving: list[Memories] = []  # copies are made of them: their memory is not free yet

    def carries(self, layer: int) -> bool:
        """Do states of this layer travel?"""
        return layer in self._route

    def here(self, layer: int) -> list[Memories]:
        """The memories of each passenger at this layer, where it computes."""
        if layer != self._at:
            self._arrive(layer)
        return self._here

    def finish(self) -> None:
        """All layers have computed."""
        self._leave()

    def _arrive(self, layer: int) -> None:
        """What was announced of this layer is waited for, the layer before goes home, the next one is announced."""
        turn, announced = self._route.index(layer), self._coming  # held until its copies are waited for
        if announced is None or announced[0] != layer:
            self._coming = self._sent(layer)
        assert self._coming is not None
        here = self._coming[1]
        self._carrier.receive()
        self._leaving.clear()
        self._leave()
        self._at, self._here = layer, here
        self._coming = self._sent(self._route[turn + 1]) if turn + 1 < len(self._route) else None

    def _sent(self, layer: int) -> tuple[int, list[Memories]]:
        """Announce a layer: what is known of it starts moving."""
        pairs: Pairs = []

        def there(one: Tensor) -> Tensor:
            arriving = torch.empty(one.shape, dtype=one.dtype, device=self._device)
            pairs.append((arriving, one.contiguous()))
            return arriving

        coming = []
        for passenger in self._passengers:
            mine: Memories = {}
            for recurrence, home in passenger.memories.items():
                if recurrence[0] == layer:
                    ahead = None if home.ahead is None else there(home.ahead)
                    known = home.nodes.read(0, passenger.nodes) if passenger.nodes else ()
                    nodes = NodeVectors(tuple(map(there, known)))
                    path = tuple(map(there, home.path))
                    mine[recurrence] = LayerMemory(there(home.state), home.follow, ahead, {}, nodes, path)
            coming.append(mine)
        self._carrier.copy(pairs)
        return layer, coming

    def _leave(self) -> None:
        """The layer that is here goes home."""
        if self._at is None:
            return
        pairs: Pairs = []
        for passenger, mine in zip(self._passengers, self._here, strict=True):
            for recurrence, memory in mine.items():
                new = recurrence not in passenger.memories
                home = passenger.memories.setdefault(recurrence, LayerMemory(memory.state, memory.follow))
                if home.shelf is None:
                    home.shelf = Shelf(self._carrier.memory, self._device)
                pairs += _going_home(memory, home, home.shelf, new)
        self._carrier.copy(pairs)
        self._leaving += self._here
        self._here, self._at = [], None


def _going_home(memory: LayerMemory, home: LayerMemory, shelf: Shelf, new: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """What to copy so that a memory is at home what it has become."""
    if new or home.path:
        home.state, home.path = shelf.place(f"state {home.turn}", memory.text), ()
        yield home.state, memory.text
    if memory.ahead is not None:
        home.ahead = shelf.place(f"state {1 - home.turn}", memory.ahead)
        yield home.ahead, memory.ahead
    home.marks = memory.marks
    if memory.nodes.held:
        held = memory.nodes.held
        home.nodes = NodeVectors(tuple(shelf.place(f"node {number}", one) for number, one in enumerate(held)))
        yield from zip(home.nodes.held, held, strict=True)
