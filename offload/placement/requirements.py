"""What a model needs, from config.json and the headers alone. Knows no torch, so that a plan costs milliseconds.

H key/value heads   D width of a head
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from offload.checkpoint.documents import Json
from offload.checkpoint.headers import ITEM_B, SCRATCH_B, Folder
from offload.checkpoint.quantized.formats import computes_as_stored
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.quantized.weight import GPU_PIECE_B, GPU_PIECES
from offload.checkpoint.roles import LAYER, PARTS, attentions, part_of
from offload.checkpoint.wrapped import tower_tensors
from offload.machine.files import LARGE_B, PAGE_B, Reading
from offload.machine.speeds import reading_for
from offload.placement.placement import Need

FLOATS = {"F32", "F16", "BF16"}
NO_ATTENTION = ("mamba", "mamba2", "falcon_mamba")  # models of recurrent layers alone
# Kinds of layers that keep no keys and values, as configs name them.
NO_KEYS = frozenset(("linear_attention", "mamba", "conv", "moe", "mlp", "M", "E", "-"))
# Of a head in four bits this much is dequantised at a time, and multiplied with so many rows.
HEAD_PIECE_B, HEAD_COMPANY = 32 << 20, 256
NF4_BLOCK = 64
EXPERTS = ".experts."
Compute = Literal["float", "int8"]  # how linears multiply that are stored in int8 or int4
KVQuant: TypeAlias = Literal[8, 4]  # bits of keys and values
KV_BLOCK, KV_MARKS_B = 64, 4  # numbers of a head in few bits that share a lowest value and a step, and bytes of these


def need_of(
    folder: Folder, item_B: int, ctx: int, beside_B: Mapping[str, int] | None = None, compute: Compute = "float"
) -> Need:
    """The need of a checked folder when computing in floats of `item_B` bytes; slightly above the truth, never below.

    With `compute` int8 linears in int8 are never dequantised.
    """
    layers: dict[int, int] = {}
    read_B: dict[int, int] = {}
    slice_B = 0
    rest = dict.fromkeys(PARTS, 0)
    count = _number(folder.config, "num_hidden_layers", 1 << 30)
    folded = fold(folder)
    dense: dict[int, int] = {}
    tensors: Counter[int] = Counter()
    few: tuple[int, ...] | None = None
    shapes: list[tuple[int, ...]] = []
    tables_B: list[int] = []
    changed = {one.name for one in folder.changes}
    for weight in folded.quantised.values():
        match = LAYER.search(weight.name)
        dense_B = -(-math.prod(weight.shape) * item_B // 64) * 64
        if match is None:
            rest[part_of(weight.name)] += dense_B
            stays = part_of(weight.name) == "head" and weight.stays and weight.name not in changed
            few = weight.shape if stays else few
        elif (layer := int(match[1])) < count:
            if weight.name in changed or not in_integers(compute, weight.scheme, weight.name, weight.shape):
                dense[layer] = dense.get(layer, 0) + dense_B
            layers[layer] = layers.get(layer, 0) + sum(-(-m.nbytes // 64) * 64 for m in weight.members.values())
            read_B[layer] = read_B.get(layer, 0) + weight.nbytes
            tensors[layer] += len(weight.members)
            shapes.append(weight.shape)
            tables_B.append(weight.tables_B)
    for entry in folded.dense.values():
        converts = entry.dtype in FLOATS and ITEM_B[entry.dtype] != item_B
        wanted_B = math.prod(entry.shape) * (item_B if entry.dtype in FLOATS else ITEM_B[entry.dtype])
        # Padded for alignment; tensors that end up fused are padded once, so this may count a little too much.
        wanted_B = -(-wanted_B // 64) * 64
        if converts:
            slice_B = max(slice_B, next(entry.slices(SCRATCH_B))[1].nbytes)  # the first is the largest
        match = LAYER.search(entry.name)
        if match is None:
            rest[part_of(entry.name)] += wanted_B
        elif int(match[1]) < count:  # what follows (multi-token prediction) stays on disk
            layers[int(match[1])] = layers.get(int(match[1]), 0) + wanted_B
            read_B[int(match[1])] = read_B.get(int(match[1]), 0) + entry.nbytes
            tensors[int(match[1])] += 1
    for change in folder.changes:
        match = LAYER.search(change.name)
        if match and int(match[1]) < count:
            for entry in (change.a, change.b):
                layers[int(match[1])] = layers.get(int(match[1]), 0) + -(-entry.nbytes // 64) * 64
                read_B[int(match[1])] = read_B.get(int(match[1]), 0) + entry.nbytes
                tensors[int(match[1])] += 1
            shapes.append(change.shape)
    for layer, nbytes in layers.items():
        # Large tensors may leave a hole before them, so that they are read straight into place.
        layers[layer] = nbytes + min(tensors[layer], nbytes // LARGE_B) * PAGE_B
    need = Need(
        layers_B=tuple(layers[index] for index in sorted(layers)) or (0,),
        read_B=tuple(read_B[index] for index in sorted(layers)) or (0,),
        embeddings_B=rest["embeddings"],
        norms_B=rest["norms"],
        head_B=rest["head"],
        cache_B=cache_B(folder.config, ctx, item_B),
        cache_widths=cache_widths(folder.config),
        cache_stays=shared_caches(folder.config),
        lookups_B=rest["lookups"],
        ctx=ctx,
        scratch_B=scratch_B(slice_B, reading_for(folder.weights_at)),
        beside_B=beside_B or {},
        dense_B=max(dense.values(), default=0),
        passing_B=passing_B(shapes, tables_B),
    )
    return need if few is None else stored_head(need, (few[0], few[1]), item_B)


def passing_B(shapes: Iterable[tuple[int, ...]], tables_B: Iterable[int] = ()) -> int:
    """What a GPU holds beside weights in few bits, of these shapes, while they are dequantised or multiplied.

    `tables_B`: what each takes beside pieces of its values (`Quantised.tables_B`).
    """
    largest_B = 4 * max((math.prod(shape[-2:]) for shape in shapes), default=0)
    return GPU_PIECES * min(GPU_PIECE_B, largest_B) + max(tables_B, default=0)


def tower_B(folder: Folder, item_B: int) -> int:
    """What of a tower is in memory while it looks at an image: its largest block and all that is no block."""
    blocks: Counter[int] = Counter()
    rest_B = 0
    for name, entry in tower_tensors(folder.beside).items():
        items = math.prod(entry.shape) * (2 if entry.dtype == "U8" else 1)  # two codes of four bits a byte
        if match := LAYER.search(name):
            blocks[int(match[1])] += items * item_B
        else:
            rest_B += items * item_B
    return rest_B + max(blocks.values(), default=0)


def in_integers(compute: Compute, stored: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix of a layer that is `stored` so is multiplied as it is: one of experts is not, they are fused."""
    return compute == "int8" and computes_as_stored(stored) and len(shape) == 2 and EXPERTS not in name


def stored_head(need: Need, shape: tuple[int, int], item_B: int) -> Need:
    """The same with a head of this shape that lies in NF4 on disk already: nothing dense is on the way."""
    return replace(few_bit_head(need, shape, item_B), head_passing_B=0)


def few_bit_head(need: Need, shape: tuple[int, int], item_B: int) -> Need:
    """The same with a head of this shape in NF4, a float for each block; one that was tied becomes a second matrix."""
    (V, H), blocks = shape, -(-math.prod(shape) // NF4_BLOCK)
    dense_B = -(-V * H * item_B // 64) * 64
    tied = need.head_B < dense_B
    return replace(
        need,
        head_B=need.head_B - (0 if tied else dense_B) + -(-V * H // 2) + blocks * 4,
        head_rows_B=head_rows(V, H, item_B) * (H + HEAD_COMPANY) * item_B,
        head_passing_B=0 if tied else dense_B,
    )


def head_rows(V: int, H: int, item_B: int) -> int:
    """Rows of a head in four bits that are dense at a time: whole blocks of weights, and no more than fit a piece."""
    whole = NF4_BLOCK // math.gcd(H, NF4_BLOCK)
    return min(V, max(1, HEAD_PIECE_B // (H * item_B * whole)) * whole)


def scratch_B(slice_B: int, reading: Reading) -> int:
    """What reading takes beside the layers: slices that are converted, and bounce buffers."""
    return slice_B + PAGE_B + reading.buffers_B


def cache_B(config: Mapping[str, Json], ctx: int, item_B: int) -> int:
    """Bytes of keys and values for `ctx` tokens in all layers, `item_B` each; whole even where a window would do."""
    return sum(cache_widths(config)) * ctx * item_B


def cache_widths(config: Mapping[str, Json]) -> tuple[int, ...]:
    """Numbers that each layer keeps of a token: its keys and values; none where it attends to those of another."""
    return tuple(sum(kept) for kept in cache_heads(config))


def cache_rows_B(config: Mapping[str, Json], kv_quant: KVQuant) -> tuple[int, ...]:
    """Bytes that each layer keeps of a token where its keys and values are in so many bits."""
    return tuple(sum(D * kv_quant // 8 + KV_MARKS_B * -(-D // KV_BLOCK) for D in kept) for kept in cache_heads(config))


def with_cache(need: Need, config: Mapping[str, Json], kv_quant: KVQuant | None) -> Need:
    """The need with keys and values in so many bits."""
    if kv_quant is None:
        return need
    rows_B = cache_rows_B(config, kv_quant)
    return replace(need, cache_B=sum(rows_B) * need.ctx, cache_widths=rows_B)


def cache_heads(config: Mapping[str, Json]) -> tuple[tuple[int, ...], ...]:
    """Of each layer the sizes of all heads of keys and of values; none where it attends to those of another."""
    layers, without = _layers(config), without_keys(config)
    own, usual = layers - _number(config, "num_kv_shared_layers", 0), _heads(config)

    def heads_of(layer: int) -> tuple[int, ...]:
        said = _of_layer(config, layer)
        return usual if said is config else _heads(said)

    return tuple(heads_of(layer) if layer < own and layer not in without else () for layer in range(layers))


def without_keys(config: Mapping[str, Json]) -> frozenset[int]:
    """Layers that keep no keys and values, as far as a config says which they are."""
    layers, kind = _layers(config), str(config.get("model_type"))
    if kind in NO_ATTENTION:
        return frozenset(range(layers))
    if layers and len(types := _kinds(config)) >= layers:
        return frozenset(layer for layer in range(layers) if str(types[layer]) in NO_KEYS)
    if kind.startswith(("qwen3_next", "qwen3_5")):
        every = max(_number(config, "full_attention_interval", 4), 1)
        return frozenset(layer for layer in range(layers) if (layer + 1) % every)
    if kind == "jamba":
        every, first = max(_number(config, "attn_layer_period", 8), 1), _number(config, "attn_layer_offset", 4)
        return frozenset(layer for layer in range(layers) if layer % every != first)
    if kind == "bamba" and isinstance(attending := config.get("attn_layer_indices"), list):
        return frozenset(layer for layer in range(layers) if layer not in attending)
    linear = config.get("linear_attn_config")  # Kimi Linear's, whose layers are counted from 1
    given = linear.get("kda_layers") if isinstance(linear, dict) else None
    numbers = given if isinstance(given, list) else []
    return frozenset(layer - 1 for layer in numbers if isinstance(layer, int))


def _kinds(config: Mapping[str, Json]) -> Sequence[Json]:
    """The kind of each layer, where a config names them."""
    given = (config.get(name) for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"))
    return next((kinds for kinds in given if kinds and isinstance(kinds, list | str)), ())


def _layers(config: Mapping[str, Json]) -> int:
    """How many there are, each as often as it attends; Nemotron-H says it by their kinds alone."""
    if (times := attentions(config.get("model_type"))) > 1:
        return times * _number(config, "num_layers", 0)
    return _number(config, "num_hidden_layers", len(_kinds(config)))


def shared_caches(config: Mapping[str, Json]) -> frozenset[int]:
    """Layers whose keys and values others attend to as well, and those others; all where a layer has two caches."""
    layers, shared = _layers(config), _number(config, "num_kv_shared_layers", 0)
    if attentions(config.get("model_type")) > 1:
        return frozenset(range(layers))
    kinds, own = config.get("layer_types"), layers - shared
    if not shared or not isinstance(kinds, list) or len(kinds) < layers:
        return frozenset()
    last = {kind: layer for layer, kind in enumerate(map(str, kinds[:own]))}
    return frozenset((*last.values(), *range(own, layers)))


def _heads(config: Mapping[str, Json]) -> tuple[int, ...]:
    heads = _number(config, "num_attention_heads", 1)
    if _number(config, "kv_lora_rank", 0):
        # Latent attention is cached expanded: transformers keeps full keys and values for every head.
        heads += "index_topk" in config  # keys of an index are kept as one more head
        key = sum(_number(config, name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
        return (key, _number(config, "v_head_dim", 0)) * heads
    H, hidden = _number(config, "num_key_value_heads", heads), _number(config, "hidden_size", 0)
    if config.get("model_type") == "deepseek_v4":  # a key, that of the index and the one that a block becomes
        return (_number(config, "head_dim", 512),) * 3
    H += "index_topk_blocks" in config or "sparse_attention_config" in config
    D = _number(config, "head_dim", _number(config, "attention_head_dim", hidden // max(heads, 1)))
    return (D, D) * H


def _of_layer(config: Mapping[str, Json], layer: int) -> Mapping[str, Json]:
    """The config with what it says of one layer alone: by its number, or of those that see all of the text."""
    given = config.get("per_layer_config")
    if isinstance(given, dict):
        own = next((value for key, value in given.items() if str(key).isdigit() and int(key) == layer), None)
        return {**config, **own} if isinstance(own, dict) else config
    kinds = config.get("layer_types")
    if "global_head_dim" not in config or not isinstance(kinds, list) or kinds[layer : layer + 1] != ["full_attention"]:
        return config
    head, heads = config["global_head_dim"], config.get("num_global_key_value_heads")
    fewer = {"num_key_value_heads": heads} if heads and config.get("attention_k_eq_v", True) else {}
    return {**config, "head_dim": head, **fewer}


def _number(config: Mapping[str, Json], name: str, default: int) -> int:
    """A number of the config; `default` where it is absent or null."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
