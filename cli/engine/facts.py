"""How a running engine was placed and put together, as plain values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from cli.shared.options import EngineOptions
    from offload.placement.placement import Placement
    from specexec.engine.engine import Engine


def facts_of(engine: Engine, options: EngineOptions) -> dict[str, object]:
    """`asked` are the options as they were given, the rest is what they led to."""
    return {
        "asked": options.asked,
        "model": engine.name,
        "folders": {role: str(path) for role, path in engine.folders.items()},
        "own_code": engine.own_code,
        "device": engine.device,
        "dtype": engine.dtype,
        "compute": engine.compute,
        "kv_quant": engine.kv_quant,
        "lossy": list(engine.lossy),
        "adapters": {role: list(adapters) for role, adapters in engine.adapters.items() if adapters},
        "context": engine.context,
        "drafter": engine.drafter_name,
        "sources": engine.sources,
        "reason": engine.reason,
        "drafter_failures": engine.drafter_failures,
        "budget": engine.budget,
        "exact": engine.exact_ties is not None,
        "verified": options.load.verify,
        "link_limit_Bps": options.load.link_limit_Bps,
        "placement": placement_facts(cast("Placement", engine.weights.placement)),
        "bytes_per_sweep": engine.weights.bytes_per_sweep,
    }


def placement_facts(placed: Placement) -> dict[str, object]:
    """Tiers and memory, line by line."""
    return {
        "offload": placed.offload,
        "layers": {tier: placed.count(tier) for tier in ("device", "ram", "disk")},
        "caches": {tier: placed.caches.count(tier) for tier in ("device", "ram", "disk")},
        "embeddings": "ram" if placed.embeddings_in_ram else "device",
        "ring": placed.ring,
        "ram_B": placed.host_B,
        "vram_B": placed.device_B,
        "ram_parts_B": placed.host_parts_B,
        "vram_parts_B": placed.device_parts_B,
        "disk_B_per_sweep": placed.disk_B,
        "link_B_per_sweep": placed.link_B,
        "cache_B_per_sweep": placed.cache_link_B,
        "cache_disk_B": placed.cache_disk_B,
    }
