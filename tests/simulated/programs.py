"""A small program over all that moves: layers from disk and RAM, experts on demand, keys and values in RAM or files,
states of recurrent layers in RAM.

The streams, wires, carriers and trips are the real ones; for a model there is a sum over whatever a layer is given.
L layers   H key heads   R rows   D head size   N nodes
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import offload
from offload.checkpoint.layout import Checkpoint, lay_out
from offload.checkpoint.skeleton import build
from offload.machine import host_rows
from offload.machine.files import SAFE
from offload.placement.placement import Need, Placement, Tier
from offload.stream.open import open_stream
from offload.stream.store import DiskStore
from offload.stream.stream import LayerStream
from specexec.model.architecture import LayerKind
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Passenger, Travel, Trip
from specexec.model.recurrent.memory import Followed, LayerMemory, Memories, Vectors
from specexec.model.recurrent.travel import StatePassenger, StateTrip
from tests.simulated.device import DEVICE
from tests.tiny import tiny

LAYERS = 3
WIDTHS = (2, 2, 4)
"""Head sizes of the layers' keys and values: the third needs other memory than the first."""
READ = ("self_attn.q_proj.weight", "input_layernorm.weight")
EXPERTS = "mlp.experts.down_proj"


Sweeps = tuple[tuple[int | None, int], ...]


@dataclass(frozen=True)
class Plan:
    """What one run does: all of it drawn from a seed."""

    tiers: tuple[Tier, ...]
    ring: int
    sweeps: Sweeps
    """Of each sweep: its rows if experts are fetched on demand, and before which layer it is cancelled."""
    travels: bool
    on_disk: bool
    """Do keys and values lie in files, where they travel? States never do."""
    beside: bool
    """Does the host ask for other work meanwhile?"""

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """One of many."""
        chance = random.Random(seed)
        tiers: list[Tier] = [chance.choice(("disk", "disk", "ram", "device")) for _ in range(LAYERS)]
        if tiers.count("device") == LAYERS:
            tiers[chance.randrange(LAYERS)] = "disk"
        sweeps = [(chance.choice((None, 1)), chance.choice((LAYERS, LAYERS, 1, 2))) for _ in range(2)]
        return cls(tuple(tiers), 2 if "disk" in tiers else 0, tuple(sweeps), seed % 2 == 0, seed % 8 > 3, seed % 3 == 0)


class Material:
    """A checkpoint of experts, laid out once for all runs."""

    def __init__(self, folder: Path) -> None:
        tiny(
            "mixtral", folder, vocab_size=16, num_hidden_layers=LAYERS, hidden_size=16, head_dim=4, intermediate_size=8
        )
        opened = offload.open_folder(folder)
        skeleton = build(opened, "f32", False)
        self.checkpoint: Checkpoint = lay_out(opened, skeleton, in_place=False, in_integers=False)
        self.expected = cache(self._expected)

    def _expected(self, sweeps: Sweeps, travels: bool) -> list[float]:
        here: Tier = "ram"
        plan = Plan((here,) * LAYERS, 0, sweeps, travels, on_disk=False, beside=False)
        return self.run(plan, torch.device("cpu"))

    def run(self, plan: Plan, device: torch.device = DEVICE) -> list[float]:
        """What the sweeps of a plan bring: one number each, the same on every device."""
        need = Need(tuple(block.size_B for block in self.checkpoint.layers), (0,) * LAYERS, 0, 0, 0, 0, 16)
        away: Tier = "ram"
        placement = Placement(plan.tiers, (away,) * LAYERS, plan.ring, need, on_gpu=True)
        # What was asked of the device before, as rounding a head is, may still be running.
        before = torch.ones(1 << 10, device=device) * 2
        del before
        stream = open_stream(self.checkpoint, DiskStore(self.checkpoint, SAFE), placement, device, None)
        carrier = host_rows.carrier_for(device, plan.on_disk)
        travel = Travel(frozenset(range(LAYERS)) if plan.travels else frozenset(), carrier, not plan.on_disk)
        kept, found = KVCache(), list[float]()
        with ThreadPoolExecutor(1) as worker:
            try:
                for rows, stop in plan.sweeps:
                    sweep = worker.submit(_sweep, stream, travel, kept, rows, stop, device)
                    if plan.beside:
                        asked = torch.ones(4, device=device)
                        for _ in range(3):
                            asked = asked + asked
                    found.append(sweep.result().item())
                    if stop == LAYERS:
                        kept.commit([1])  # the second of the rows becomes text: rows move, states go along it
                    kept.forget_nodes()
            finally:
                stream.close()
        return found


@torch.no_grad()
def _sweep(
    stream: LayerStream, travel: Travel, cache: KVCache, rows: int | None, stop: int, device: torch.device
) -> Tensor:
    new = 2
    cache.node_tokens.extend(range(new))
    cache.parents.extend([-1] * new)
    passenger = Passenger(cache, len(cache), len(cache) + new)
    trip = Trip(travel, dict.fromkeys(range(LAYERS), LayerKind()), [passenger], device)
    states = StateTrip(travel, range(LAYERS), [StatePassenger(cache.memories, 0)], device)
    total = torch.ones((), device=device)
    try:
        for layer in range(stop):
            tensors = stream.take(layer, rows)
            for name in READ:
                total = total * 0.5 + tensors[name].sum()
            chosen = {layer % 4, 3}
            stream.fetch(chosen)
            for expert in sorted(chosen):
                total = total + tensors[EXPERTS][expert].sum()
            if trip.carries(layer):
                key_HRD = (total * 0.01).expand(2, new, WIDTHS[layer])
                kv = trip.write(layer, 0, 0, key_HRD, key_HRD * 2)
                total = total + kv.keys_HRD[:, : passenger.total].sum() + kv.values_HRD[:, : passenger.total].sum()
                trip.leave(layer)
            here = states.here(layer)[0] if states.carries(layer) else cache.memories
            total = total + _state(here, layer, total, new)
        if stop == LAYERS:
            states.finish()
    finally:
        stream.give()
        trip.end()
    return total


def _state(here: Memories, layer: int, total: Tensor, new: int) -> Tensor:
    """What a layer reads of its state; its nodes write one vector each."""
    memory = here.setdefault((layer, "state"), LayerMemory(torch.zeros(WIDTHS[layer], device=total.device), _along))
    vector_1ND = (total * 0.01).expand(1, new, WIDTHS[layer]).clone()
    memory.nodes.write(0, (vector_1ND,), new)
    return memory.text.sum()


def _along(state: Tensor, path: Vectors, kept: Vectors) -> Followed:
    return Followed(state * 0.5 + path[0][0].sum(0), kept)
