"""The fastest mix of tiers that fits, or a refusal with both numbers and what to change. Knows no torch, no file.

What `--offload` allows:   none   every layer on the device
                           ram    nothing is read from disk after loading; what fits stays on the device
                           disk   what fits stays on the GPU, and in RAM only where a RAM budget was given;
                                  without one RAM holds the ring and nothing else
                           auto   the fastest mix of all tiers that leaves a margin free

Fastest is what moves for the fewest seconds in a sweep. Keys and values leave the device only where that is less than
what their place on it saves, or where nothing else fits; memory for disk only where `kv` says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from offload.errors import NotEnoughRam, NotEnoughVram, OffloadError
from offload.machine.memory import Free
from offload.placement.placement import RING, KVHome, Need, Offload, Placement, Tier
from offload.units import size


def place(need: Need, free: Free, offload: Offload = "auto", kv: KVHome = "ram") -> Placement:
    """The fastest mix that `offload` and `kv` allow and that fits. Raises NotEnoughRam or NotEnoughVram, with the
    numbers.
    """
    if kv == "auto" and need.cache_moves:
        try:
            return place(need, free, offload)
        except (NotEnoughRam, NotEnoughVram):
            return place(need, free, offload, "disk")
    fill_ram = free.ram_given or offload == "auto"
    cautious = replace(
        free,
        ram_B=free.ram_B - free.ram_margin_B,
        vram_B=None if free.vram_B is None else free.vram_B - free.vram_margin_B,
    )
    slowest = _slowest(offload, on_gpu=free.vram_B is not None, fill_ram=fill_ram)
    homes: list[Tier] = ["device", "ram"] if need.cache_moves and free.vram_B is not None else ["device"]
    if kv == "disk" and need.cache_moves:
        homes = ["disk"]
    fitting: list[Placement] = []
    for tier in slowest:
        for home in homes:
            mixes = (_mix(need, cautious, tier, home, ring, fill_ram) for ring in _rings(need, free, tier))
            fitting += [mix for mix in mixes if _refusal(mix, cautious) is None][:1]
    if fitting:
        return min(fitting, key=lambda mix: _moving_s(mix, free))
    # The margin is optional: before refusing, the smallest placement may use all that is there.
    for home in homes:
        for ring in _rings(need, free, slowest[-1]):
            placement = _mix(need, cautious, slowest[-1], home, ring, fill_ram)
            refusal = _refusal(placement, free)
            if refusal is None:
                return placement
    assert refusal is not None
    raise refusal


def _moving_s(placement: Placement, free: Free) -> tuple[float, float]:
    """What disk and link take in a sweep: at the same time, and among equals one after the other."""
    disk_B = placement.disk_B + placement.cache_disk_B
    disk_s, link_s = disk_B / free.disk_Bps, placement.link_B / free.link_Bps
    return max(disk_s, link_s), disk_s + link_s


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


def _mix(need: Need, free: Free, slowest: Tier, home: Tier, ring: int, fill_ram: bool) -> Placement:
    """Every layer in `slowest` and its keys and values at `home`, but for what the rest of the budgets holds."""
    layers = len(need.layers_B)
    tiers: list[Tier] = [slowest] * layers
    caches: list[Tier] = ["device" if layer in need.cache_stays else home for layer in range(layers)]

    def so_far() -> Placement:
        return Placement(tuple(tiers), tuple(caches), min(ring, layers - tiers.count("device")), need, on_gpu)

    on_gpu = free.vram_B is not None
    if free.vram_B is not None:
        # Weights first: a layer travels whole at every sweep, keys and values only as long as the text is.
        if slowest != "device":
            _fill(tiers, slowest, "device", need.layers_B, free.vram_B - (so_far().device_B or 0))
        if home == "ram":
            _fill(caches, home, "device", need.kept_B, free.vram_B - (so_far().device_B or 0))
    if slowest == "disk" and fill_ram:
        faster: Tier = "ram" if on_gpu else "device"
        _fill(tiers, slowest, faster, need.layers_B, free.ram_B - so_far().host_B)
    return so_far()


def _fill(tiers: list[Tier], slow: Tier, fast: Tier, sizes_B: Sequence[int], budget_B: int) -> None:
    """Move layers up, evenly spread, so that slow and fast ones alternate and the wire never idles."""
    layers = [layer for layer, tier in enumerate(tiers) if tier == slow]
    for index in spread([sizes_B[layer] for layer in layers], budget_B):
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
            "a smaller --ctx or --budget, fewer bits by --drafter-quant, --drafter ngram, or --device cpu."
            if tier != "none"
            else "--offload ram, or --offload disk.",
        )
    if placement.host_B > free.ram_B:
        limit = f" (limit: {free.ram_limit})" if free.ram_limit else ""
        drafter = "--drafter ngram, " if placement.host_parts_B.get("drafter") else ""
        on_disk = "--kv disk, " if placement.need.cache_moves and "disk" not in placement.caches else ""
        return NotEnoughRam(
            f"--offload {tier} needs {size(placement.host_B)} of RAM, {size(free.ram_B)} are free{limit}.",
            _breakdown(placement.host_parts_B),
            "--offload disk, or close other programs."
            if tier != "disk"
            else f"a smaller --ctx or --budget, {drafter}{on_disk}or a smaller model.",
        )
    return None


def _breakdown(parts_B: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {size(nbytes)}" for name, nbytes in parts_B.items())
