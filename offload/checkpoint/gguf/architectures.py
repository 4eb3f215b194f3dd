"""Architectures of GGUF files: which transformers model each is, its config, and its tensors' names there.

Names and settings follow llama.cpp's own converter (conversion/*.py), read backwards. What it changed in the values is
written behind a tensor's name, for quantized/gguf.py to undo: rows of queries and keys with the two halves of each head
in turns (`pairs9`: 9 heads).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offload.checkpoint.documents import Json
from offload.checkpoint.gguf.facts import GgufFacts

Settings = dict[str, Json]

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Descriptions that config.json holds instead.
DESCRIPTIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, "ffn_norm": "post_attention_layernorm", **DENSE}
# Llama 3.1 and later; a GGUF holds the factors that follow from these, and their largest is the one that varies.
LLAMA_3_LOW, LLAMA_3_HIGH, LLAMA_3_CONTEXT = 1.0, 4.0, 8192


@dataclass(frozen=True)
class Architecture:
    """One architecture: the model it is in transformers, the names inside a block, and how its config is made."""

    model_type: str
    model_class: str
    names: Mapping[str, str]
    settings: Callable[[GgufFacts], Settings]
    pairs: bool = False
    """Whether rows of queries and keys are stored with the two halves of each head in turns."""


def config_of(facts: GgufFacts) -> Settings:
    """What config.json of the same model would say. Raises UnsupportedModel, or CorruptShard for nonsense."""
    found = architecture_of(facts)
    kinds = {tensor.kind.name for tensor in facts.tensors.values()}
    half = "float16" if "F16" in kinds else "float32"
    ids = {f"{name}_token_id": facts.token(old) for name, old in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {
        "model_type": found.model_type,
        "architectures": [found.model_class],
        "dtype": half if kinds <= {"F32", "F16"} else "bfloat16",
        **ids,
        **found.settings(facts),
    }


def architecture_of(facts: GgufFacts) -> Architecture:
    """The row of the table. Raises UnsupportedModel."""
    name = facts.architecture
    if name == "llama" and facts.has("expert_count"):
        raise facts.refuse("has experts, whose names are not known here")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise facts.refuse(f"is of an architecture whose names are not known here; known are {known}")
    return ARCHITECTURES[name]


def _basics(facts: GgufFacts, rope: Settings | None = None) -> Settings:
    heads, width = facts.count("attention.head_count"), facts.count("embedding_length")
    vocabulary, columns = facts.shape("token_embd.weight")
    if columns != width:
        raise facts.refuse(f"has embedding_length {width}, and its token_embd.weight has {columns} columns")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": facts.layers,
        "intermediate_size": facts.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(facts),
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope or _rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def _head_dim(facts: GgufFacts) -> int:
    return facts.count("attention.key_length", facts.count("embedding_length") // facts.count("attention.head_count"))


def _rope(facts: GgufFacts, rotated: int | None = None) -> Settings:
    """How positions are encoded; all dimensions of a head are rotated unless the caller knows of a part."""
    rotated = rotated or _head_dim(facts)
    if facts.count("rope.dimension_count", rotated) != rotated:
        raise facts.refuse(f"rotates {facts.count('rope.dimension_count')} of {rotated} dimensions of a head")
    theta = facts.real("rope.freq_base", 10000.0)
    kind = facts.name("rope.scaling.type", "none")
    plain: Settings = {"rope_type": "default", "rope_theta": theta}
    if facts.has("rope.scale_linear"):
        return {**plain, "rope_type": "linear", "factor": facts.real("rope.scale_linear")}
    if kind == "none":
        factors = facts.factors("rope_freqs.weight")
        return plain if factors is None else {**plain, **_llama_3(facts, factors, theta, rotated)}
    factor = facts.real("rope.scaling.factor")
    if kind == "linear":
        return {**plain, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        context = facts.count("rope.scaling.original_context_length")
        return {**plain, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    raise facts.refuse(f"scales its positions by '{kind}', which is not known here")


def _llama_3(facts: GgufFacts, factors: list[float], theta: float, rotated: int) -> Settings:
    """The scaling of Llama 3.1 from the factors that follow from it; others are refused."""
    factor = max(factors)
    if factor == min(factors) == 1.0:
        return {}
    expected = []
    for index in range(rotated // 2):
        turns = LLAMA_3_CONTEXT * theta ** (-2 * index / rotated) / (2 * math.pi)
        smooth = min(max((turns - LLAMA_3_LOW) / (LLAMA_3_HIGH - LLAMA_3_LOW), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(factors) != len(expected) or any(abs(a / b - 1) > 1e-3 for a, b in zip(factors, expected, strict=True)):
        raise facts.refuse("scales its positions by factors (rope_freqs.weight) that are not those of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA_3_LOW,
        "high_freq_factor": LLAMA_3_HIGH,
        "original_max_position_embeddings": LLAMA_3_CONTEXT,
    }


def _llama(facts: GgufFacts) -> Settings:
    biases = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
    return {**_basics(facts), **{name: f"blk.0.{bias}" in facts.tensors for name, bias in biases.items()}}


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA, _llama, pairs=True),
}
