"""What lives where, decided with numbers alone. Knows no torch, no file and no machine.

`place` takes what the model needs and what is free, and answers with the first tier that fits, or refuses with both
numbers and a way out. A resident model is a placement with every layer in memory.
"""

from dataclasses import dataclass
from typing import Literal

from offload.errors import NotEnoughRam, NotEnoughVram, OffloadError

Offload = Literal["auto", "none", "ram", "disk"]
Tier = Literal["none", "ram", "disk"]

GiB = 1 << 30
# Two buffers overlap reading with computing; a third absorbs layers that take unequally long.
RING = 3


@dataclass(frozen=True)
class Need:
    """Bytes a model takes: in memory (compute dtype) and, per sweep, from disk."""

    layers_B: tuple[int, ...]
    disk_B: int
    embeddings_B: int
    norms_B: int
    head_B: int
    cache_B: int
    ctx: int
    scratch_B: int = 0
    extra_B: int = 0
    dense_B: int = 0
    """One layer dequantised; zero where weights travel as they compute."""

    @property
    def fixed_B(self) -> int:
        """What is in memory whatever the placement: embeddings, norms, head, cache, a dense layer, the caller's own."""
        return self.embeddings_B + self.norms_B + self.head_B + self.cache_B + self.dense_B + self.extra_B

    @property
    def widest_B(self) -> int:
        """The largest layer, so the size of a buffer."""
        return max(self.layers_B)


@dataclass(frozen=True)
class Free:
    """What may be used. `vram_B` is None where the computation is on the CPU."""

    ram_B: int
    vram_B: int | None = None
    ram_limit: str = ""


@dataclass(frozen=True)
class Placement:
    """Where each layer lives, and how much memory that takes on the host and on the device that computes."""

    tiers: tuple[Tier, ...]
    ring: int
    need: Need
    host_B: int
    device_B: int | None

    @property
    def offload(self) -> Tier:
        """The tier the layers live in."""
        return self.tiers[0]

    @property
    def ring_B(self) -> int:
        """Bytes of all buffers of the ring, on each side that has one."""
        return self.ring * self.need.widest_B

    @property
    def stream_B(self) -> int:
        """Bytes that come over the wire in one sweep."""
        return 0 if self.offload == "none" else self.need.disk_B if self.offload == "disk" else sum(self.need.layers_B)

    @property
    def summary(self) -> str:
        """One line for people."""
        count, need = len(self.tiers), self.need
        match self.offload:
            case "none":
                where = "GPU memory" if self.device_B is not None else "RAM"
                line = f"none: all {count} layers stay in {where}, {size(sum(need.layers_B))}"
            case "ram":
                line = f"ram: {count} layers stream from RAM, {size(self.stream_B)} per sweep"
            case "disk":
                line = f"disk: {count} layers stream from SSD, {size(self.stream_B)} per sweep"
        ring = f", ring {self.ring} × {size(need.widest_B)}" if self.ring else ""
        return line + ring


def place(need: Need, free: Free, offload: Offload = "auto") -> Placement:
    """The first of none, ram, disk that fits, or the one asked for; else a refusal with the numbers."""
    tiers: tuple[Tier, ...] = ("none", "ram", "disk") if offload == "auto" else (offload,)
    for tier in tiers:
        for ring in _rings(need, free, tier):
            placement = _lay(need, free, tier, ring)
            refusal = _refusal(placement, free)
            if refusal is None:
                return placement
    assert refusal is not None
    raise refusal


def _rings(need: Need, free: Free, tier: Tier) -> list[int]:
    count = len(need.layers_B)
    if tier == "none" or (tier == "ram" and free.vram_B is None):
        return [0]  # computed in place
    return sorted({min(RING, count), min(2, count)}, reverse=True)


def _lay(need: Need, free: Free, tier: Tier, ring: int) -> Placement:
    layers_B, ring_B = sum(need.layers_B), ring * need.widest_B
    tiers: tuple[Tier, ...] = (tier,) * len(need.layers_B)
    staging_B = need.scratch_B + {"none": 0, "ram": layers_B, "disk": ring_B}[tier]
    if free.vram_B is None:
        held_B = layers_B if tier == "none" else 0
        return Placement(tiers, ring, need, need.fixed_B + held_B + staging_B, None)
    # Weights pass through host memory one block at a time on their way to the device.
    passing_B = max(need.widest_B, need.embeddings_B, need.head_B) if tier == "none" else 0
    device_B = need.fixed_B + (layers_B if tier == "none" else ring_B)
    return Placement(tiers, ring, need, staging_B + passing_B, device_B)


def _refusal(placement: Placement, free: Free) -> OffloadError | None:
    tier = placement.offload
    if placement.device_B is not None and free.vram_B is not None and placement.device_B > free.vram_B:
        return NotEnoughVram(
            f"--offload {tier} needs {size(placement.device_B)} of GPU memory, {size(free.vram_B)} are free.",
            _breakdown(placement),
            "a smaller --ctx, or --device cpu." if tier != "none" else "--offload ram, or --offload disk.",
        )
    if placement.host_B > free.ram_B:
        limit = f" (limit: {free.ram_limit})" if free.ram_limit else ""
        return NotEnoughRam(
            f"--offload {tier} needs {size(placement.host_B)} of RAM, {size(free.ram_B)} are free{limit}.",
            _breakdown(placement),
            "--offload disk, or close other programs." if tier != "disk" else "a smaller --ctx, or a smaller model.",
        )
    return None


def _breakdown(placement: Placement) -> str:
    need = placement.need
    layers = [("layers", sum(need.layers_B))] if placement.ring == 0 else [("layer buffers", placement.ring_B)]
    parts = [
        *layers,
        ("embeddings", need.embeddings_B),
        ("head", need.head_B),
        (f"KV cache at --ctx {need.ctx}", need.cache_B),
        ("a layer dequantised", need.dense_B),
        ("drafter and work space", need.extra_B + need.scratch_B),
    ]
    return " · ".join(f"{name} {size(nbytes)}" for name, nbytes in parts if nbytes)


def size(nbytes: float) -> str:
    """Bytes for people: `1.2 GiB`, `3.4 MiB`."""
    for unit, scale in (("GiB", GiB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale / 10:
            digits = 1 if nbytes >= scale else 2
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
