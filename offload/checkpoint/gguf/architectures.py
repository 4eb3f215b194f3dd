"""Architectures of GGUF files: which transformers model each is, its config, and its tensors' names there.

Names and settings follow llama.cpp's own converter (conversion/*.py), read backwards. What it changed in the values is
written behind a tensor's name, for quantized/gguf.py to undo: rows of queries and keys with the two halves of each head
in turns (`pairs9`: 9 heads), norms that are one larger (`plus1`).
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
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LLAMA = {**ATTENTION, "ffn_norm": "post_attention_layernorm", **DENSE}
# `*` is the number of an expert; a tensor of all experts becomes as many.
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
GEMMA_2 = {
    **ATTENTION,
    **DENSE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI_3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
GLM_4 = {
    **ATTENTION,
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_mlp_layernorm",
}
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
    norms_plus_1: bool = False


def config_of(facts: GgufFacts) -> Settings:
    """What config.json of the same model would say. Raises UnsupportedModel, or CorruptShard for nonsense."""
    found = architecture_of(facts)
    kinds = {tensor.kind.name for tensor in facts.tensors.values()}
    half = "float16" if "F16" in kinds else "float32"
    ids = {f"{name}_token_id": facts.token(old) for name, old in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()}
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
        name = "llama (experts)"
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(one for one in ARCHITECTURES if "(" not in one))
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
        "intermediate_size": facts.count("feed_forward_length", _width_of_experts(facts)),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(facts),
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope or _rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def _head_dim(facts: GgufFacts) -> int:
    return facts.count("attention.key_length", _width_of_heads(facts))


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


def _mixtral(facts: GgufFacts) -> Settings:
    experts = {
        "num_local_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
    }
    return {**_basics(facts), **experts, "sliding_window": None}


def _qwen_moe(facts: GgufFacts) -> Settings:
    return {
        **_basics(facts),
        "num_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
        "moe_intermediate_size": facts.count("expert_feed_forward_length"),
        # llama.cpp knows no other step either: every layer has experts.
        "decoder_sparse_step": 1,
    }


def _qwen_2_moe(facts: GgufFacts) -> Settings:
    shared = facts.shape("blk.0.ffn_up_shexp.weight")[0]
    return {**_qwen_moe(facts), "shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen_3_moe(facts: GgufFacts) -> Settings:
    return {**_qwen_moe(facts), "norm_topk_prob": True}


def _gemma(facts: GgufFacts) -> Settings:
    return {**_basics(facts), "tie_word_embeddings": True}


def _gemma_2(facts: GgufFacts) -> Settings:
    return {
        **_gemma(facts),
        # llama.cpp's own rule: the file does not say, and of the published models the one of 46 layers differs.
        "query_pre_attn_scalar": _width_of_heads(facts) if facts.layers == 46 else _head_dim(facts),
        "sliding_window": facts.count("attention.sliding_window"),
        "attn_logit_softcapping": facts.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.real("final_logit_softcapping", 30.0),
    }


def _gemma_3(facts: GgufFacts) -> Settings:
    local: Settings = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    capped = facts.has("final_logit_softcapping")
    return {
        **_gemma(facts),
        "query_pre_attn_scalar": _width_of_heads(facts) if facts.layers == 62 else _head_dim(facts),
        "sliding_window": facts.count("attention.sliding_window"),
        "final_logit_softcapping": facts.real("final_logit_softcapping") if capped else None,
        "attn_logit_softcapping": None,
        "rope_parameters": {"full_attention": _rope(facts), "sliding_attention": local},
    }


def _width_of_experts(facts: GgufFacts) -> int | None:
    return facts.count("expert_feed_forward_length") if facts.has("expert_feed_forward_length") else None


def _width_of_heads(facts: GgufFacts) -> int:
    return facts.count("embedding_length") // facts.count("attention.head_count")


def _phi_3(facts: GgufFacts) -> Settings:
    dim = _width_of_heads(facts)
    rotated = facts.count("rope.dimension_count", dim)
    long, short = facts.factors("rope_factors_long.weight"), facts.factors("rope_factors_short.weight")
    rope = _rope(facts, rotated)
    if rotated != dim:
        rope["partial_rotary_factor"] = rotated / dim
    original = facts.count("rope.scaling.original_context_length", facts.count("context_length"))
    if long and short:
        rope |= {"rope_type": "longrope", "long_factor": [*long], "short_factor": [*short]}
        rope |= {"original_max_position_embeddings": original}
    window = facts.count("attention.sliding_window", 0, least=0)
    settings = {**_basics(facts, rope), "original_max_position_embeddings": original, "sliding_window": window or None}
    return {name: value for name, value in settings.items() if name != "head_dim"}


def _glm_4(facts: GgufFacts) -> Settings:
    dim = _head_dim(facts)
    rotated = facts.count("rope.dimension_count", dim // 2)
    rope = {**_rope(facts, rotated), "partial_rotary_factor": rotated / dim}
    return {**_basics(facts, rope), "attention_bias": "blk.0.attn_q.bias" in facts.tensors}


def _granite(facts: GgufFacts) -> Settings:
    return {
        **_llama(facts),
        "attention_multiplier": facts.real("attention.scale", 1.0),
        "embedding_multiplier": facts.real("embedding_scale", 1.0),
        "residual_multiplier": facts.real("residual_scale", 1.0),
        "logits_scaling": facts.real("logit_scale", 1.0),
    }


QWEN_3 = {**LLAMA, **HEAD_NORMS}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA, _llama, pairs=True),
    "llama (experts)": Architecture("mixtral", "MixtralForCausalLM", {**LLAMA, **MIXTRAL}, _mixtral, pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, _basics),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2MoeForCausalLM", {**LLAMA, **EXPERTS, **SHARED_EXPERT}, _qwen_2_moe),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", QWEN_3, _basics),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**QWEN_3, **EXPERTS}, _qwen_3_moe),
    "gemma": Architecture("gemma", "GemmaForCausalLM", LLAMA, _gemma, norms_plus_1=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", GEMMA_2, _gemma_2, norms_plus_1=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", {**GEMMA_2, **HEAD_NORMS}, _gemma_3, norms_plus_1=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", PHI_3, _phi_3),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", GLM_4, _glm_4),
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA, _granite, pairs=True),
}
