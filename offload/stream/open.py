"""From a placement to a running stream: which layers are loaded now, which are kept, which are read every time."""

import logging
from collections.abc import Callable, Mapping

import torch

from offload.checkpoint.layout import Checkpoint
from offload.machine.accelerator import accelerator_of
from offload.placement.placement import Placement, Tier
from offload.stream.products import with_products
from offload.stream.store import Arena, DiskStore, TieredStore
from offload.stream.stream import LayerStream
from offload.stream.transfer import DeviceWire, HostWire, Wire

log = logging.getLogger(__name__)


Keep = Callable[[int, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def _as_read(_: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return tensors


def open_stream(
    checkpoint: Checkpoint,
    disk: DiskStore,
    placement: Placement,
    device: torch.device,
    limit_Bps: float | None,
    on_layer_read: Callable[[int, int], None] | None = None,
    keep: Keep = _as_read,
) -> LayerStream:
    """One stream over all tiers; what stays in memory is read here, once.

    `on_layer_read` is called with layers read, layers to read; `keep` with a layer that stays where it computes, and
    its tensors: it says what is kept of them. The stream closes the disk.
    """
    blocks = checkpoint.layers
    layers = _layers(placement)
    staying = [*layers["device"], *layers["ram"]]

    def settled(layer: int, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """With the products of adapters, but for what is added when codes have been dequantised."""
        block = blocks[layer]
        return with_products(block, block.views(flat), {item.name for item in block.packed})

    def filled(layer: int) -> Arena:
        arena = Arena(blocks[layer].size_B)
        disk.read_block(blocks[layer], arena)
        if device.type == "cpu":  # it computes from here
            settled(layer, arena.flat)
        if on_layer_read is not None:
            on_layer_read(staying.index(layer) + 1, len(staying))
        return arena

    if limit_Bps is not None and len(layers["device"]) == len(blocks):
        log.warning("the link limit has no effect: every layer stays in memory (--offload none)")
    # On the CPU a layer stays where it was read; to a device it goes through memory that is given back at once.
    resident: dict[int, Mapping[str, torch.Tensor]] = {}
    for layer in layers["device"]:
        flat = filled(layer).flat.to(device)
        if device.type != "cpu":
            settled(layer, flat)
        resident[layer] = keep(layer, blocks[layer].views(flat))
    kept = {layer: filled(layer) for layer in layers["ram"]}
    # Layers in RAM need no buffer here, but as many turns as there would be, so that layers are read in the same order.
    staging_B = max((blocks[layer].size_B for layer in layers["disk"]), default=0)
    ring = [Arena(staging_B) if staging_B else None for _ in range(placement.ring or min(2, len(layers["ram"])))]
    if not layers["disk"]:
        disk.close()
    wire: Wire = HostWire()
    if ring and (accelerator := accelerator_of(device)):
        slot_B = max(blocks[layer].size_B for layer in (*layers["ram"], *layers["disk"]))
        wire = DeviceWire(accelerator, len(ring), slot_B, [arena for arena in ring if arena], list(kept.values()))
    return LayerStream(blocks, TieredStore(checkpoint, disk, kept), ring, wire, limit_Bps, resident)


def _layers(placement: Placement) -> dict[Tier, list[int]]:
    found: dict[Tier, list[int]] = {"device": [], "ram": [], "disk": []}
    for layer, tier in enumerate(placement.tiers):
        found[tier].append(layer)
    return found
