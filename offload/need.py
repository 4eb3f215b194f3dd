"""What a model needs, from config.json and the headers alone. Knows no torch, so that a plan costs milliseconds.

H key/value heads   D width of a head
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from offload.placement import Need
from offload.shards import ITEM_B, Folder, Json

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")
EMBEDDING = re.compile(r"(^|\.)(embed_\w+|\w*embeddings?|wte|wpe|project_in|project_out)\.")
FLOATS = {"F32", "F16", "BF16"}


def part_of(name: str) -> str:
    """`head`, `embeddings` or `norms`: the kind of a tensor outside the layers."""
    if HEAD.search(name):
        return "head"
    return "embeddings" if EMBEDDING.search(name) else "norms"


def need_of(folder: Folder, item_B: int, ctx: int, extra_B: int = 0) -> Need:
    """The need of a checked folder when computing in floats of `item_B` bytes; an estimate a hair above the truth."""
    layers: dict[int, int] = {}
    disk_B = scratch_B = 0
    rest = {"head": 0, "embeddings": 0, "norms": 0}
    count = text_number(folder.config, "num_hidden_layers", 0)
    for entry in folder.entries.values():
        wanted_B = math.prod(entry.shape) * (item_B if entry.dtype in FLOATS else ITEM_B[entry.dtype])
        # Padded for alignment; fused tensors are padded once, so this may count a little too much.
        wanted_B = -(-wanted_B // 64) * 64
        scratch_B = max(scratch_B, entry.nbytes if entry.dtype in FLOATS and ITEM_B[entry.dtype] != item_B else 0)
        match = LAYER.search(entry.name)
        if match is None:
            rest[part_of(entry.name)] += wanted_B
        elif int(match[1]) < count:  # extra layers (multi-token prediction) stay on disk
            layers[int(match[1])] = layers.get(int(match[1]), 0) + wanted_B
            disk_B += entry.nbytes
    need = Need(
        layers_B=tuple(layers[i] for i in sorted(layers)) or (0,),
        disk_B=disk_B,
        embeddings_B=rest["embeddings"],
        norms_B=rest["norms"],
        head_B=rest["head"],
        cache_B=0,
        ctx=ctx,
        scratch_B=scratch_B,
        extra_B=extra_B,
    )
    return replace(need, cache_B=cache_B(folder.config, ctx, item_B))


def cache_B(config: Mapping[str, Json], ctx: int, item_B: int) -> int:
    """Bytes of keys and values for `ctx` tokens in all layers, kept whole even where a window would do."""
    heads = text_number(config, "num_attention_heads", 1)
    hidden = text_number(config, "hidden_size", 0)
    H = text_number(config, "num_key_value_heads", heads)
    D = text_number(config, "head_dim", hidden // max(heads, 1))
    width = 2 * H * D
    if (rope := text_number(config, "qk_rope_head_dim", 0)) and "kv_lora_rank" in config:
        # Latent attention is cached expanded: transformers keeps full keys and values for every head.
        width = heads * (text_number(config, "qk_nope_head_dim", 0) + rope + text_number(config, "v_head_dim", 0))
    return text_number(config, "num_hidden_layers", 0) * width * ctx * item_B


def text_number(config: Mapping[str, Json], name: str, default: int) -> int:
    """A number of the (text) config; `default` where it is absent or null."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
