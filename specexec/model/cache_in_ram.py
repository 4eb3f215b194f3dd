"""Keys and values in RAM or on disk: a layer's rows arrive before it attends, its new ones go back afterwards.

While one layer attends, the rows of the next are on their way: two layers' rows are on the device at a time. What goes
where is decided here, a `Carrier` moves it. Knows no device.   H key heads   R rows   D head size
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specexec.model.architecture import LayerKind
from specexec.model.cache import KVCache, LayerKV
from specexec.sizes import rows_held

Pairs = Iterable[tuple[Tensor, Tensor]]


class Carrier(Protocol):
    """Copies between where rows live and where the computation is, while that goes on."""

    @property
    def spare_rows(self) -> int:
        """More of them than needed, for which memory is asked where rows have to move into larger memory."""

    def memory(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory for numbers of the dtype of `like`, made for fast copies."""

    def copy(self, pairs: Pairs) -> None:
        """Start filling each first tensor from the second, once what was asked of the device so far is computed."""

    def receive(self) -> None:
        """What is asked of the device from now on waits for the copies so far."""

    def settle(self) -> None:
        """Wait until nothing moves any more."""


@dataclass(frozen=True)
class Travel:
    """Which layers keep their keys and values away from where they attend, and who carries them."""

    layers: frozenset[int]
    carrier: Carrier
    with_states: bool = False
    """Do states of recurrent layers among them travel too (recurrent/travel.py)?"""


@dataclass(frozen=True)
class Passenger:
    """One sequence of a sweep: of its `total` rows those from `new` on are made by the sweep."""

    cache: KVCache
    new: int
    total: int

    def first_seen(self, kind: LayerKind) -> int:
        """No new row sees a committed one before this: new rows come after all of the text."""
        if kind.window is not None:
            return max(self.cache.rows - kind.window + 1, 0)
        return 0 if kind.chunk is None else max(len(self.cache) // kind.chunk * kind.chunk - self.cache.dropped, 0)


class Trip:
    """One sweep: `write` all new rows of a travelling layer, `leave` it, and so on in order. `end` in any case."""

    def __init__(
        self, travel: Travel, kinds: Mapping[int, LayerKind], passengers: Items[Passenger], device: torch.device
    ) -> None:
        self._carrier, self._kinds, self._passengers, self._device = travel.carrier, kinds, passengers, device
        self._route = [layer for layer in kinds if layer in travel.layers]
        self._sent: int | None = None  # the layer whose rows were announced last
        self._here: int | None = None  # the layer that attends
        self._places: tuple[dict[int, LayerKV], dict[int, LayerKV]] = ({}, {})  # rows on the device, by passenger
        for passenger in passengers:  # nothing moves yet: now is the time to move into larger memory
            layers = passenger.cache.layers
            for layer in self._route:
                if layer in layers:
                    layers[layer] = self._kept(layers[layer], passenger.new, passenger.total)

    def carries(self, layer: int) -> bool:
        """Do keys and values of this layer travel?"""
        return layer in self._route

    def write(self, layer: int, number: int, node: int, key_HRD: Tensor, value_HRD: Tensor) -> LayerKV:
        """Store rows of a passenger's nodes from `node` on; all its rows of the layer, on the device."""
        if layer != self._here:
            self._arrive(layer, LayerKV(key_HRD, value_HRD))
        passenger, kv = self._passengers[number], self._places[self._route.index(layer) % 2][number]
        kv.write(passenger.cache.rows + node, key_HRD, value_HRD, passenger.total)
        return kv

    def leave(self, layer: int) -> None:
        """The layer has attended: its new rows go home."""
        here = self._places[self._route.index(layer) % 2]
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, passenger in enumerate(self._passengers):
            home = passenger.cache.layers.get(layer)
            if home is None:
                home = self._kept(here[number], 0, passenger.total)
                passenger.cache.layers[layer] = home
            pairs += home.runs(here[number], passenger.new, passenger.total)
        self._carrier.copy(pairs)

    def end(self) -> None:
        """However the sweep ended: nothing moves any more."""
        self._carrier.settle()

    def _kept(self, rows: LayerKV, used: int, total: int) -> LayerKV:
        return rows.kept_in(self._carrier.memory, used, total, self._carrier.spare_rows)

    def _arrive(self, layer: int, like: LayerKV) -> None:
        """What was announced of this layer is waited for, the next one is announced."""
        turn = self._route.index(layer)
        if self._sent != layer:
            self._send(turn)
        self._carrier.receive()
        if turn + 1 < len(self._route):
            self._send(turn + 1)
        for number in range(len(self._passengers)):
            self._place(turn, number, like)
        self._here = layer

    def _send(self, turn: int) -> None:
        """Announce a layer: what its new rows will see starts moving."""
        layer = self._sent = self._route[turn]
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, passenger in enumerate(self._passengers):
            if (home := passenger.cache.layers.get(layer)) is not None:
                first = passenger.first_seen(self._kinds[layer])
                pairs += self._place(turn, number, home).runs(home, first, passenger.new)
        self._carrier.copy(pairs)

    def _place(self, turn: int, number: int, like: LayerKV) -> LayerKV:
        """Memory on the device for a passenger's rows of one layer; those of the layer before the last are gone."""
        places, rows = self._places[turn % 2], rows_held(self._passengers[number].total)

        def fits(held: Tensor, wanted: Tensor) -> bool:
            return (held.shape[0], held.shape[2]) == (wanted.shape[0], wanted.shape[2])

        held = places.get(number)
        if held is None or not (fits(held.keys_HRD, like.keys_HRD) and fits(held.values_HRD, like.values_HRD)):
            # Copies of what lay here were waited for when the layer between arrived: the memory is free.
            keys_HRD, values_HRD = (
                torch.empty((tensor.shape[0], rows, tensor.shape[2]), dtype=tensor.dtype, device=self._device)
                for tensor in (like.keys_HRD, like.values_HRD)
            )
            places[number] = LayerKV(keys_HRD, values_HRD)
        return places[number]
