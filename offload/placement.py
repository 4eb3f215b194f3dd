"""What lives where, decided layer by layer with numbers alone. Knows no torch, no file and no machine.

`place` takes what the model needs and what is free, and answers with a tier for every layer, or refuses with both
numbers and a way out. A resident model is a placement with every layer on the device; on the CPU the device is RAM.

What `--offload` allows:   none   every layer on the device
                           ram    nothing is read from disk after loading; what fits stays on the device
                           disk   what fits stays on the GPU, and in RAM only where a RAM budget was given;
                                  without one RAM holds the ring and nothing else
                           auto   the fastest mix of all tiers that leaves a margin free
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offload.errors import NotEnoughRam, NotEnoughVram, OffloadError

Offload = Literal["auto", "none", "ram", "disk"]
Tier = Literal["device", "ram", "disk"]

GiB = 1 << 30
# Two buffers overlap reading with computing; a third absorbs layers that take unequally long.
RING = 3


@dataclass(frozen=True)
class Need:
    """Bytes a model takes: its layers in memory (compute dtype) and on disk, and everything beside them."""

    layers_B: tuple[int, ...]
    read_B: tuple[int, ...]
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
    def disk_B(self) -> int:
        """What reading every layer from disk reads."""
        return sum(self.read_B)

    @property
    def widest_B(self) -> int:
        """The largest layer, so the size of a buffer."""
        return max(self.layers_B)


@dataclass(frozen=True)
class Free:
    """What may be used. `vram_B` is None where the computation is on the CPU.

    The margins stay free where the choice is ours: budgets given by the user have none. Only a RAM budget that was
    given is filled by `--offload disk`.
    """

    ram_B: int
    vram_B: int | None = None
    ram_limit: str = ""
    ram_margin_B: int = 0
    vram_margin_B: int = 0
    ram_given: bool = False


@dataclass(frozen=True)
class Placement:
    """Where each layer lives, and how much memory that takes on the host and on the device that computes."""

    tiers: tuple[Tier, ...]
    ring: int
    need: Need
    host_B: int
    device_B: int | None

    @property
    def offload(self) -> Literal["none", "ram", "disk"]:
        """The slowest tier a layer lives in, by its option's name."""
        return "disk" if "disk" in self.tiers else "ram" if "ram" in self.tiers else "none"

    @property
    def ring_B(self) -> int:
        """Bytes of all buffers of the ring, on each side that has one."""
        return self.ring * self.need.widest_B

    @property
    def disk_B(self) -> int:
        """Bytes that one sweep reads from disk."""
        return sum(self._of("disk", self.need.read_B))

    @property
    def stream_B(self) -> int:
        """Bytes that come over the wire in one sweep, from disk or from RAM."""
        return self.disk_B + sum(self._of("ram", self.need.layers_B))

    @property
    def link_B(self) -> int:
        """Bytes that one sweep carries from RAM to the device."""
        return 0 if self.device_B is None else sum(self._of("disk", self.need.layers_B)) + self.kept_B("ram")

    def kept_B(self, tier: Tier) -> int:
        """Bytes of the layers that live in this tier, as they lie in memory."""
        return sum(self._of(tier, self.need.layers_B))

    def count(self, tier: Tier) -> int:
        """How many layers live there."""
        return self.tiers.count(tier)

    @property
    def summary(self) -> str:
        """One line for people: what streams from where, and what stays."""
        memory = "GPU memory" if self.device_B is not None else "RAM"
        if self.offload == "none":
            return f"none: all {len(self.tiers)} layers stay in {memory}, {size(self.kept_B('device'))}"
        groups = [
            (self.count("disk"), "stream from SSD", f"{size(self.disk_B)} per sweep"),
            (self.count("ram"), "stream from RAM", f"{size(self.kept_B('ram'))} per sweep"),
            (self.count("device"), f"stay in {memory}", size(self.kept_B("device"))),
        ]
        parts = [f"{count} {verb}, {amount}" for count, verb, amount in groups if count]
        parts[0] = parts[0].replace(" ", " layers ", 1)
        ring = f", ring {self.ring} × {size(self.need.widest_B)}" if self.ring else ""
        return f"{self.offload}: {'; '.join(parts)}{ring}"

    def _of(self, tier: Tier, sizes_B: Sequence[int]) -> list[int]:
        return [size_B for size_B, found in zip(sizes_B, self.tiers, strict=True) if found == tier]


def place(need: Need, free: Free, offload: Offload = "auto") -> Placement:
    """The fastest mix that `offload` allows and that fits; else a refusal with the numbers."""
    fill_ram = free.ram_given or offload == "auto"
    cautious = replace(
        free,
        ram_B=free.ram_B - free.ram_margin_B,
        vram_B=None if free.vram_B is None else free.vram_B - free.vram_margin_B,
    )
    slowest = _slowest(offload, on_gpu=free.vram_B is not None, fill_ram=fill_ram)
    for tier in slowest:
        # The margin is a courtesy: before refusing, what is there is taken for the least that can work.
        limit = free if tier == slowest[-1] else cautious
        for ring in _rings(need, free, tier):
            placement = _mix(need, cautious, tier, ring, fill_ram)
            refusal = _refusal(placement, limit)
            if refusal is None:
                return placement
    assert refusal is not None
    raise refusal


def _slowest(offload: Offload, on_gpu: bool, fill_ram: bool) -> tuple[Tier, ...]:
    """The slowest tier to make do with, best first; a mix holds faster ones too."""
    if offload == "none":
        return ("device",)
    if offload == "ram":
        return ("device", "ram") if on_gpu else ("ram",)
    if on_gpu:
        return ("device", "ram", "disk") if fill_ram else ("device", "disk")
    return ("device", "disk") if fill_ram else ("disk",)


def _rings(need: Need, free: Free, tier: Tier) -> list[int]:
    count = len(need.layers_B)
    if tier == "device" or (tier == "ram" and free.vram_B is None):
        return [0]  # computed in place
    return sorted({min(RING, count), min(2, count)}, reverse=True)


def _mix(need: Need, free: Free, slowest: Tier, ring: int, fill_ram: bool) -> Placement:
    """Every layer in `slowest`, but for what the rest of the budgets holds."""
    tiers: list[Tier] = [slowest] * len(need.layers_B)
    if free.vram_B is not None and slowest != "device":
        _fill(tiers, slowest, "device", need, free.vram_B - (_lay(need, free, tiers, ring).device_B or 0))
    if slowest == "disk" and fill_ram:
        faster: Tier = "device" if free.vram_B is None else "ram"
        _fill(tiers, slowest, faster, need, free.ram_B - _lay(need, free, tiers, ring).host_B)
    return _lay(need, free, tiers, min(ring, len(tiers) - tiers.count("device")))


def _fill(tiers: list[Tier], slow: Tier, fast: Tier, need: Need, budget_B: int) -> None:
    """Move layers up, evenly spread, so that slow and fast ones alternate and the wire never idles."""
    layers = [layer for layer, tier in enumerate(tiers) if tier == slow]
    for index in spread([need.layers_B[layer] for layer in layers], budget_B):
        tiers[layers[index]] = fast


def spread(sizes_B: Sequence[int], budget_B: int) -> list[int]:
    """Evenly spaced indices whose sizes fit the budget: of all such choices the one that holds most."""
    count, best, most_B = len(sizes_B), [], 0
    for chosen in range(1, count + 1):
        indices = [(2 * index + 1) * count // (2 * chosen) for index in range(chosen)]
        total_B = sum(sizes_B[index] for index in indices)
        if most_B < total_B <= budget_B:
            best, most_B = indices, total_B
    return best


def _lay(need: Need, free: Free, tiers: Sequence[Tier], ring: int) -> Placement:
    held = Placement(tuple(tiers), ring, need, 0, None)
    buffers_B = held.ring_B if "disk" in tiers else 0
    if free.vram_B is None:
        kept_B = held.kept_B("device") + held.kept_B("ram")
        return replace(held, host_B=need.fixed_B + need.scratch_B + kept_B + buffers_B)
    # On their way to the device, weights pass through host memory one block at a time.
    passing_B = max(need.widest_B, need.embeddings_B, need.head_B)
    host_B = need.scratch_B + max(passing_B, held.kept_B("ram") + buffers_B)
    return replace(held, host_B=host_B, device_B=need.fixed_B + held.kept_B("device") + held.ring_B)


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
    kept_B = sum(need.layers_B) if placement.ring == 0 else placement.kept_B("device")
    parts = [
        ("layers", kept_B),
        ("layer buffers", placement.ring_B),
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
