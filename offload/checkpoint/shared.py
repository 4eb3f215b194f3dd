"""Tensors that several layers share and a checkpoint holds once: under the name that each layer has for them.

Every layer streams by itself, so each of them reads the bytes again. So do the turns of a model that sends each token
through its layers several times: each turn is a layer (unrolled.py). Knows no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.checkpoint.documents import Json
from offload.checkpoint.entry import Entry

_SHARED = re.compile(r"^(?P<before>.*\blayers\.)(?P<layer>\d+)(?P<after>\.shared_transf(ormer)?\..+)$")


_STACKED = re.compile(r"^(?P<before>.*\b)(?P<stack>[LH])_module\.layers\.(?P<layer>\d+)(?P<after>\..+)$")


@dataclass(frozen=True)
class Cycles:
    """How HRM sends a token through its two stacks of as many layers: `low` times the one, then the other, `high` times
    in all (arXiv 2506.21734).
    """

    layers: int
    low: int
    high: int

    def turns(self, stack: str, layer: int) -> list[int]:
        """The numbers of a layer of the stack L or H among all turns."""
        own = range(self.low) if stack == "L" else (self.low,)
        return [(cycle * (self.low + 1) + one) * self.layers + layer for cycle in range(self.high) for one in own]


def cycles_of(config: Mapping[str, Json]) -> Cycles | None:
    """Those that a config asks for; None where each layer has one turn."""
    sizes = [config.get(name) for name in ("num_layers_per_stack", "num_hidden_layers", "L_cycles", "H_cycles")]
    stacked, layers, low, high = (
        size if isinstance(size, int) else default for size, default in zip(sizes, (0, 0, 3, 2), strict=True)
    )
    return Cycles(stacked or layers, low, high) if config.get("model_type") == "hrm_text" else None


def with_turns(config: Mapping[str, Json]) -> dict[str, Json]:
    """The config with a layer for each turn, as transformers reads it."""
    if (cycles := cycles_of(config)) is None:
        return dict(config)
    count = cycles.layers * (cycles.low + 1) * cycles.high
    return {**config, "num_layers_per_stack": cycles.layers, "num_hidden_layers": count}


def with_shared(config: Mapping[str, Json], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """All entries, and those of layers that have none of their own because they take another layer's."""
    cycles = cycles_of(config)
    return _by_hybrid(config, entries) if cycles is None else _by_turn(cycles, entries)


def _by_turn(cycles: Cycles, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = _STACKED.match(name)
        turns = cycles.turns(match["stack"], int(match["layer"])) if match else ()
        names = [f"{match['before']}layers.{turn}{match['after']}" for turn in turns] if match else [name]
        found |= {own: replace(entry, name=own) for own in names}
    return found


def _by_hybrid(config: Mapping[str, Json], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    kinds, blocks = config.get("layers_block_type"), config.get("num_mem_blocks", 1)
    if (
        config.get("model_type") not in ("zamba", "zamba2")
        or not isinstance(kinds, list)
        or not isinstance(blocks, int)
    ):
        return dict(entries)
    hybrid = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    takers: dict[int, list[int]] = {}
    for number, layer in enumerate(hybrid[blocks:]):
        takers.setdefault(hybrid[number % blocks], []).append(layer)
    found = dict(entries)
    for match in filter(None, map(_SHARED.match, entries)):
        for layer in takers.get(int(match["layer"]), ()):
            name = f"{match['before']}{layer}{match['after']}"
            found.setdefault(name, replace(entries[match[0]], name=name))
    return found
