"""Tensors that several layers share and a checkpoint holds once (Zamba): under the name that each layer has for them.

Every layer streams by itself, so each of them reads the bytes again. Knows no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from offload.checkpoint.documents import Json
from offload.checkpoint.entry import Entry

_SHARED = re.compile(r"^(?P<before>.*\blayers\.)(?P<layer>\d+)(?P<after>\.shared_transf(ormer)?\..+)$")


def with_shared(config: Mapping[str, Json], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """All entries, and those of layers that have none of their own because they take another layer's."""
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
