"""What a model's config says about trees: the attention of each layer, and what cannot be exact. Reads no weights.

A tree needs every layer to see text and ancestors alone: attention through positions, recurrent layers as recurrent/
computes them. ALiBi counts slots, and two RoPE kinds choose their frequencies by the longest position of the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specexec.errors import ContextLengthExceeded, UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_CONTEXT = 8192
# Decoders of transformers' own that are known to verify trees, whatever their sizes; of others transformers is asked.
USUAL = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "gpt_oss",
     "deepseek_v3", "phi3")
)  # fmt: skip
USUAL_ROPE = (None, "default", "linear", "llama3", "yarn", "su")
USUAL_LAYERS = frozenset(("full_attention", "sliding_attention"))
# Models that cannot be streamed at all, and why.
REFUSED = {
    "recurrent_gemma": "its layers keep the state of a text in themselves, so that two texts would mix",
    "beam": "its layers want all rows of a prompt at once",
    "xlm": "it writes each token over one that stands for nothing, which is no text after a text",
    "xlnet": "it writes each token over one that stands for nothing, which is no text after a text",
    "cpmant": "its trunk takes token ids alone, with a prompt of its own before them",
}
# Models that decode plainly although their class claims more, and why.
NO_TREES = {
    "diffllama": "its layers attend more than once",
    "doge": "its layers lay masks of their own over the text",
    "nemotron": "its layers hand nothing on to their attention",
    "moshi": "nodes of a tree came out wrong when it was tried",
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Index:
    """How a layer finds the `most` keys that a row attends to: `heads` of its index are `width` numbers wide.

    Unless it is its `own`, they are those that the last layer with an index of its own has found. With a `block`, each
    head finds blocks of so many positions for its share of the layer's heads, the last `local` ones in any case.
    """

    heads: int
    width: int
    most: int
    own: bool = True
    block: int = 0
    local: int = 0


@dataclass(frozen=True)
class Compression:
    """A row sees the last `window` tokens and one key for each block of so many `tokens`: all, or an index's choice."""

    tokens: int
    window: int
    index: Index | None = None


@dataclass(frozen=True)
class LayerKind:
    """How far one layer sees, None = without limit; whose keys and values it attends to, None = its own.

    `attends`, `recurrent`: whether it attends at all, and whether it carries a state from token to token. `together`:
    rows of one image see one another. `temperature`: queries grow with their position (`warmer`).
    `index`: a row attends to some keys only. `compressed`: to a window and to keys of whole blocks.
    """

    window: int | None = None
    chunk: int | None = None
    keys_of: int | None = None
    attends: bool = True
    recurrent: bool = False
    together: bool = False
    temperature: tuple[float, float] | None = None
    index: Index | None = None
    compressed: Compression | None = None


ONLY_RECURRENT = LayerKind(attends=False, recurrent=True)
NEITHER = LayerKind(attends=False)
LINEAR: Mapping[str, LayerKind] = {"linear_attention": ONLY_RECURRENT}
# Models whose recurrent layers can branch (recurrent/), by model_type, and the kinds of layers that only they have.
RECURRENT: Mapping[str, Mapping[str, LayerKind]] = {
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "olmo_hybrid": LINEAR,
    "lfm2": {"conv": ONLY_RECURRENT},
    "lfm2_moe": {"conv": ONLY_RECURRENT},
    "lfm3": {"conv": ONLY_RECURRENT},
    "bamba": LINEAR,
    "granitemoehybrid": LINEAR,
    "falcon_h1": {"hybrid": LayerKind(recurrent=True)},
    "nemotron_h": {**LINEAR, "moe": NEITHER, "mlp": NEITHER},
    "zamba2": {**LINEAR, "hybrid": LayerKind(recurrent=True)},
    "mamba2": LINEAR,
    "mamba": LINEAR,
    "falcon_mamba": LINEAR,
    "jamba": LINEAR,
    "kimi_linear": LINEAR,
    "bailing_hybrid": LINEAR,
}
# Layers whose tokens become keys block by block, and whether an index chooses among those.
COMPRESSED = {"compressed_sparse_attention": True, "heavily_compressed_attention": False}


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """The kind of every layer. Raises UnsupportedArchitecture, by name, for layers that cannot verify a tree."""
    types: list[str] | None = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    if types is None:
        uses = getattr(config, "use_sliding_window", True)
        return [LayerKind(window=window if uses else None)] * int(config.num_hidden_layers)
    kinds = [_kind(kind, config) for kind in types[: config.num_hidden_layers]]
    for layer, kind in enumerate(kinds):
        if kind.index and getattr(config, "indexer_types", ["full"] * len(kinds))[layer] == "shared":
            kinds[layer] = replace(kind, index=replace(kind.index, own=False))
    if getattr(config, "attn_temperature_tuning", False):
        temperature = float(config.floor_scale), float(config.attn_scale)
        pairs = zip(kinds, config.no_rope_layers, strict=True)
        kinds = [kind if rope else replace(kind, temperature=temperature) for kind, rope in pairs]
    owners = shared_keys(types, int(getattr(config, "num_kv_shared_layers", 0) or 0), len(kinds))
    return [replace(kind, keys_of=owners.get(layer)) for layer, kind in enumerate(kinds)]


def shared_keys(types: Sequence[str], shared: int, layers: int) -> dict[int, int]:
    """Of the last `shared` layers: the last one before them of the same type, whose keys and values it attends to."""
    own = layers - shared
    return {layer: max(at for at in range(own) if types[at] == types[layer]) for layer in range(own, layers)}


def _kind(name: str, config: PretrainedConfig) -> LayerKind:
    if name == "full_attention":
        return LayerKind()
    if name == "sliding_attention":
        return LayerKind(window=config.sliding_window)
    if name == "chunked_attention":
        return LayerKind(chunk=config.attention_chunk_size)
    if name == "indexed_attention":
        return LayerKind(index=Index(config.index_n_heads, config.index_head_dim, config.index_topk))
    if name == "minimax_m3_sparse":
        blocks = {"block": config.index_block_size, "local": config.index_local_blocks}
        return LayerKind(index=Index(config.index_n_heads, config.index_head_dim, config.index_topk_blocks, **blocks))
    if name in COMPRESSED:
        index = Index(config.index_n_heads, config.index_head_dim, config.index_topk) if COMPRESSED[name] else None
        compression = Compression(config.compress_rates[name], config.sliding_window, index)
        return LayerKind(recurrent=True, compressed=compression)
    if kind := RECURRENT.get(config.model_type, {}).get(name):
        return kind
    raise _unsupported(config, f"it has {name} layers, whose state cannot branch")


def can_branch(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether `check_tree_support` has no objection."""
    return not only_plainly(model_class, config)


def only_plainly(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """Why a model gets one token a sweep; empty for one that verifies trees."""
    try:
        check_tree_support(model_class, config)
    except UnsupportedArchitecture as refusal:
        return refusal.what.rstrip(".")
    return ""


def check_any_support(config: PretrainedConfig) -> None:
    """Raise UnsupportedArchitecture, by name, for a model that does not even decode plainly."""
    if why := REFUSED.get(config.model_type):
        raise UnsupportedArchitecture(f"architecture {config.model_type!r} cannot be streamed: {why}.")


def check_tree_support(model_class: type[PreTrainedModel], config: PretrainedConfig) -> list[LayerKind]:
    """The layer kinds of a model that can verify trees exactly; otherwise UnsupportedArchitecture says why."""
    # Those classes were written before they could, or state only what they do without a tree.
    if not getattr(model_class, "_supports_attention_backend", False) and config.model_type not in RECURRENT:
        raise _unsupported(config, "its attention (ALiBi, recurrent or of its own making) cannot be given a tree")
    if why := NO_TREES.get(config.model_type):
        raise _unsupported(config, why)
    for rope_type in _rope_types(config):
        if rope_type in ("dynamic", "longrope"):
            raise _unsupported(config, f"its {rope_type} RoPE depends on the longest position of the whole tree")
    return layer_kinds(config)


def limits_steps(config: PretrainedConfig) -> bool:
    """Whether steps of state spaces are kept within limits while a prompt is read, and not while a text is written.

    So it is in transformers 5.23: its passes over many tokens know `dt_limit`, its single steps do not.
    """
    if config.model_type in ("nemotron_h", "zamba2"):
        return bool(config.time_step_min > 0)
    limits: tuple[float, float] | None = getattr(config, "time_step_limit", None)
    return limits is not None and tuple(limits) != (0.0, math.inf)


def is_usual(config: Mapping[str, object]) -> bool:
    """Whether config.json alone shows a model that can run, trees and all. Knows no torch; False: ask transformers."""
    ropes = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    settings = [rope for rope in ropes if isinstance(rope, Mapping)]
    settings += [inner for rope in settings for inner in rope.values() if isinstance(inner, Mapping)]
    kinds = [rope.get("rope_type", rope.get("type")) for rope in settings]
    layers = config.get("layer_types")
    sizes = [config.get(name) for name in SIZES]
    return (
        config.get("model_type") in USUAL
        and "auto_map" not in config
        and all(kind in USUAL_ROPE for kind in kinds)
        and (layers is None or (isinstance(layers, list) and all(one in USUAL_LAYERS for one in layers)))
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    )


def context_for(asked: int | None, longest: int) -> int:
    """The context that a model gets; ContextLengthExceeded beyond what it was made for."""
    if asked is not None and asked > longest:
        raise ContextLengthExceeded(f"--ctx {asked:,} is more than the {longest:,} tokens the model was made for.")
    return asked or min(DEFAULT_CONTEXT, longest)


def longest_text(config: PretrainedConfig) -> int:
    """Positions the model was made for."""
    return int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)


def _rope_types(config: PretrainedConfig) -> list[str]:
    """Kinds of RoPE in use: the config holds one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(one.get("rope_type", "default")) for one in (nested or [parameters])]


def _unsupported(config: PretrainedConfig, why: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"architecture {config.model_type!r} cannot verify trees: {why}.",
        hint="--drafter none streams it with plain decoding, one token a sweep.",
    )
