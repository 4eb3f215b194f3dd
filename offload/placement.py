"""What lives where, decided layer by layer with numbers alone. Knows no torch, no file and no machine.

`place` takes what the model needs and what is free, and answers with a tier for every layer, or refuses with both
numbers and a way out. A resident model is a placement with every layer on the device; on the CPU the device is RAM.

What `--offload` allows:   none   every layer on the device
                           ram    nothing is read from disk after loading; what fits stays on the device
                           disk   what fits stays on the GPU, and in RAM only where a RAM budget was given;
                                  without one RAM holds the ring and nothing else
                           auto   the fastest mix of all tiers that leaves a margin free
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    dense_B: int = 0
    """One layer dequantised; zero where weights travel as they compute."""
    beside_B: Mapping[str, int] = field(default_factory=dict)
    """What the caller takes beside the model (drafter, trees, logits), by what it is for."""

    @property
    def resident_B(self) -> int:
        """All of it in memory, once it has been read."""
        fixed_B = self.embeddings_B + self.norms_B + self.head_B + self.cache_B + self.dense_B
        return sum(self.layers_B) + fixed_B + sum(self.beside_B.values())

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
    on_gpu: bool

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
        return 0 if not self.on_gpu else sum(self._of("disk", self.need.layers_B)) + self.kept_B("ram")

    @property
    def host_B(self) -> int:
        """Bytes of RAM that it takes."""
        return sum(self.host_parts_B.values())

    @property
    def device_B(self) -> int | None:
        """Bytes of GPU memory that it takes; None where the CPU computes."""
        return sum(self.device_parts_B.values()) if self.on_gpu else None

    @property
    def host_parts_B(self) -> dict[str, int]:
        """RAM by what it is for."""
        streamed = {
            "layers in RAM": self.kept_B("ram"),
            "layer buffers": self.ring_B if "disk" in self.tiers else 0,
            "reading": self.need.scratch_B,
        }
        if self.on_gpu:
            # On their way to the device, weights pass through host memory one block at a time.
            passing_B = max(self.need.widest_B, self.need.embeddings_B, self.need.head_B)
            on_the_way_B = max(0, passing_B - streamed["layers in RAM"] - streamed["layer buffers"])
            return _present({**streamed, "weights on their way": on_the_way_B})
        return _present({"layers that stay": self.kept_B("device"), **streamed, **self._computing_B})

    @property
    def device_parts_B(self) -> dict[str, int]:
        """GPU memory by what it is for; nothing where the CPU computes."""
        if not self.on_gpu:
            return {}
        return _present({"layers that stay": self.kept_B("device"), "layer buffers": self.ring_B, **self._computing_B})

    @property
    def _computing_B(self) -> dict[str, int]:
        """What lies where the computation is, whatever the placement."""
        need = self.need
        return {
            "embeddings and norms": need.embeddings_B + need.norms_B,
            "head": need.head_B,
            f"KV cache at --ctx {need.ctx}": need.cache_B,
            "a layer dequantised": need.dense_B,
            **need.beside_B,
        }

    def kept_B(self, tier: Tier) -> int:
        """Bytes of the layers that live in this tier, as they lie in memory."""
        return sum(self._of(tier, self.need.layers_B))

    def count(self, tier: Tier) -> int:
        """How many layers live there."""
        return self.tiers.count(tier)

    @property
    def summary(self) -> str:
        """One line for people: what streams from where, and what stays."""
        memory = "GPU memory" if self.on_gpu else "RAM"
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
    on_gpu = free.vram_B is not None
    if free.vram_B is not None and slowest != "device":
        _fill(tiers, slowest, "device", need, free.vram_B - (Placement(tuple(tiers), ring, need, on_gpu).device_B or 0))
    if slowest == "disk" and fill_ram:
        faster: Tier = "device" if free.vram_B is None else "ram"
        _fill(tiers, slowest, faster, need, free.ram_B - Placement(tuple(tiers), ring, need, on_gpu).host_B)
    return Placement(tuple(tiers), min(ring, len(tiers) - tiers.count("device")), need, on_gpu)


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


def _refusal(placement: Placement, free: Free) -> OffloadError | None:
    tier = placement.offload
    if placement.device_B is not None and free.vram_B is not None and placement.device_B > free.vram_B:
        return NotEnoughVram(
            f"--offload {tier} needs {size(placement.device_B)} of GPU memory, {size(free.vram_B)} are free.",
            _breakdown(placement.device_parts_B),
            "a smaller --ctx or --budget, or --device cpu." if tier != "none" else "--offload ram, or --offload disk.",
        )
    if placement.host_B > free.ram_B:
        limit = f" (limit: {free.ram_limit})" if free.ram_limit else ""
        return NotEnoughRam(
            f"--offload {tier} needs {size(placement.host_B)} of RAM, {size(free.ram_B)} are free{limit}.",
            _breakdown(placement.host_parts_B),
            "--offload disk, or close other programs."
            if tier != "disk"
            else "a smaller --ctx or --budget, or a smaller model.",
        )
    return None


def _present(parts_B: Mapping[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in parts_B.items() if nbytes}


def _breakdown(parts_B: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {size(nbytes)}" for name, nbytes in parts_B.items())


def size(nbytes: float) -> str:
    """Bytes for people: `1.2 GiB`, `3.4 MiB`."""
    for unit, scale in (("GiB", GiB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale / 10:
            digits = 1 if nbytes >= scale else 2
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
