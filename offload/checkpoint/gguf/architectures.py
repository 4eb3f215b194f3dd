"""Architectures of GGUF files: which transformers model each is, its config, and its tensors' names there.

Names and settings follow llama.cpp's own converter (conversion/*.py), read backwards. What it changed in the values is
written behind a tensor's name, for quantized/gguf.py to undo: norms that are one larger (`plus1`), decays that are no
logarithms any more (`log`). What it changed in their order is said by orders.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from offload.checkpoint.gguf import orders, settings
from offload.checkpoint.gguf.facts import GgufFacts
from offload.checkpoint.gguf.orders import Order
from offload.checkpoint.gguf.positions import Settings

# Names without the ending .weight or .bias, which stays; whole ones, where the module's has no such ending.
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
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

QWEN_3 = {**LLAMA, **HEAD_NORMS}
QWEN_35_DELTA = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_gate": "linear_attn.in_proj_z",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
}
QWEN_35_ORDERS: dict[str, Order] = {
    "attn_qkv.weight": orders.mixed_rows,
    "ssm_conv1d.weight": orders.mixed_rows,
    "attn_gate.weight": orders.value_rows,
    "ssm_alpha.weight": orders.value_rows,
    "ssm_beta.weight": orders.value_rows,
    "ssm_a": orders.value_rows,
    "ssm_dt.bias": orders.value_rows,
    "ssm_out.weight": orders.value_columns,
}
QWEN_3_NEXT_DELTA = {
    **QWEN_35_DELTA,
    "attn_gate": "linear_attn.in_proj_qkvz",
    "attn_qkv": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
GPT_OSS = {
    **ATTENTION,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    **{f"ffn_{part}_exps.weight": "mlp.experts.gate_up_proj" for part in ("gate", "up")},
    **{f"ffn_{part}_exps.bias": "mlp.experts.gate_up_proj_bias" for part in ("gate", "up")},
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
GPT_OSS_ORDERS: dict[str, Order] = {
    **{f"ffn_gate_exps.{ending}": orders.even for ending in ("weight", "bias")},
    **{f"ffn_up_exps.{ending}": orders.odd for ending in ("weight", "bias")},
    "ffn_down_exps.weight": orders.turned,
}
DEEPSEEK_2 = {
    **LLAMA,
    **EXPERTS,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    "attn_kv_b": "self_attn.kv_b_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
DEEPSEEK_2_ORDERS: dict[str, Order] = {
    "attn_k_b.weight": orders.keys_of_latents,
    "attn_v_b.weight": orders.values_of_latents,
}
GEMMA_4 = {
    **GEMMA_2,
    **HEAD_NORMS,
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
PAIRS: dict[str, Order] = {
    **{f"attn_q.{ending}": orders.query_pairs for ending in ("weight", "bias")},
    **{f"attn_k.{ending}": orders.key_pairs for ending in ("weight", "bias")},
}


@dataclass(frozen=True)
class Architecture:
    """One architecture: the model it is in transformers, the names inside a block, and how its config is made."""

    model_type: str
    model_class: str
    names: Mapping[str, str]
    settings: Callable[[GgufFacts], Settings]
    orders: Mapping[str, Order] = field(default_factory=dict)
    """Of what is written in another order, by whole names inside a block."""
    norms_plus_1: bool = False

    def undo(self, name: str) -> str:
        """What has to be undone in the values of a tensor, or nothing."""
        if name.endswith("norm.weight") and self.norms_plus_1 and not name.endswith("ssm_norm.weight"):
            return "plus1"
        return "log" if name.endswith(".ssm_a") else ""


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
    if name == "deepseek2" and settings.by_sigmoid(facts):
        name = "deepseek2 (sigmoid)"
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(one for one in ARCHITECTURES if "(" not in one))
        raise facts.refuse(f"is of an architecture whose names are not known here; known are {known}")
    return ARCHITECTURES[name]


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA, settings.llama, PAIRS),
    "llama (experts)": Architecture("mixtral", "MixtralForCausalLM", {**LLAMA, **MIXTRAL}, settings.mixtral, PAIRS),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, settings.basics),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**LLAMA, **EXPERTS, **SHARED_EXPERT}, settings.qwen_2_moe
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", QWEN_3, settings.basics),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**QWEN_3, **EXPERTS}, settings.qwen_3_moe),
    "qwen3next": Architecture(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**QWEN_3, **EXPERTS, **SHARED_EXPERT, **QWEN_3_NEXT_DELTA},
        settings.qwen_3_next,
        {"attn_qkv.weight": orders.grouped_rows, "attn_gate.weight": orders.grouped_gates},
        norms_plus_1=True,
    ),
    "qwen35": Architecture(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {**QWEN_3, **QWEN_35_DELTA},
        settings.qwen_35,
        QWEN_35_ORDERS,
        norms_plus_1=True,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {**QWEN_3, **EXPERTS, **SHARED_EXPERT, **QWEN_35_DELTA},
        settings.qwen_35_moe,
        QWEN_35_ORDERS,
        norms_plus_1=True,
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", LLAMA, settings.gemma, norms_plus_1=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", GEMMA_2, settings.gemma_2, norms_plus_1=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**GEMMA_2, **HEAD_NORMS}, settings.gemma_3, norms_plus_1=True
    ),
    "gemma4": Architecture("gemma4_text", "Gemma4ForCausalLM", GEMMA_4, settings.gemma_4),
    "gpt-oss": Architecture("gpt_oss", "GptOssForCausalLM", GPT_OSS, settings.gpt_oss, GPT_OSS_ORDERS),
    "deepseek2": Architecture(
        "deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK_2, settings.deepseek_2, DEEPSEEK_2_ORDERS
    ),
    "deepseek2 (sigmoid)": Architecture(
        "deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK_2, settings.deepseek_3, DEEPSEEK_2_ORDERS
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", PHI_3, settings.phi_3),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", GLM_4, settings.glm_4),
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA, settings.granite, PAIRS),
}
