"""What config.json of each architecture would say, from the header of a GGUF file."""

from offload.checkpoint.gguf.facts import GgufFacts
from offload.checkpoint.gguf.positions import Settings, head_dim, partly, rope

# How experts are chosen, by the numbers of llama.cpp.
SOFTMAX, SIGMOID = 1, 2
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def basics(facts: GgufFacts, positions: Settings | None = None, *, uniform: bool = True) -> Settings:
    """What every config has; what differs from layer to layer is left out unless they are `uniform`."""
    heads, width = facts.count("attention.head_count"), facts.count("embedding_length")
    vocabulary, columns = facts.shape("token_embd.weight")
    if columns != width:
        raise facts.refuse(f"has embedding_length {width}, and its token_embd.weight has {columns} columns")
    found: Settings = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": positions or rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }
    if uniform:
        found |= {
            "intermediate_size": facts.count("feed_forward_length", _width_of_experts(facts)),
            "num_key_value_heads": facts.count("attention.head_count_kv", heads),
            "head_dim": head_dim(facts),
        }
    return found


def llama(facts: GgufFacts) -> Settings:
    """Linears may have biases."""
    biases = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
    return {**basics(facts), **{name: f"blk.0.{bias}" in facts.tensors for name, bias in biases.items()}}


def mixtral(facts: GgufFacts) -> Settings:
    """Experts in every layer, and no window."""
    experts = {
        "num_local_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
    }
    return {**basics(facts), **experts, "sliding_window": None}


def _mixture(facts: GgufFacts) -> Settings:
    return {
        "num_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
        "moe_intermediate_size": facts.count("expert_feed_forward_length"),
        # llama.cpp knows no other step either: every layer has experts.
        "decoder_sparse_step": 1,
    }


def qwen_2_moe(facts: GgufFacts) -> Settings:
    """Experts, and one that all rows go through, whose width its tensors say."""
    shared = facts.shape("blk.0.ffn_up_shexp.weight")[0]
    return {**basics(facts), **_mixture(facts), "shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def qwen_3_moe(facts: GgufFacts) -> Settings:
    """Experts whose weights add up to one."""
    return {**basics(facts), **_mixture(facts), "norm_topk_prob": True}


def gemma(facts: GgufFacts) -> Settings:
    """The head is the embeddings, always."""
    return {**basics(facts), "tie_word_embeddings": True}


def gemma_2(facts: GgufFacts) -> Settings:
    """Logits and scores are capped; layers see a window and everything in turns."""
    return {
        **gemma(facts),
        # llama.cpp's own rule: the file does not say, and of the published models the one of 46 layers differs.
        "query_pre_attn_scalar": _width_of_heads(facts) if facts.layers == 46 else head_dim(facts),
        "sliding_window": facts.count("attention.sliding_window"),
        "attn_logit_softcapping": facts.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.real("final_logit_softcapping", 30.0),
    }


def gemma_3(facts: GgufFacts) -> Settings:
    """Positions of layers with a window turn at another speed."""
    local: Settings = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    capped = facts.has("final_logit_softcapping")
    return {
        **gemma(facts),
        "query_pre_attn_scalar": _width_of_heads(facts) if facts.layers == 62 else head_dim(facts),
        "sliding_window": facts.count("attention.sliding_window"),
        "final_logit_softcapping": facts.real("final_logit_softcapping") if capped else None,
        "attn_logit_softcapping": None,
        "rope_parameters": {"full_attention": rope(facts), "sliding_attention": local},
    }


def _width_of_experts(facts: GgufFacts) -> int | None:
    return facts.count("expert_feed_forward_length") if facts.has("expert_feed_forward_length") else None


def _width_of_heads(facts: GgufFacts) -> int:
    return facts.count("embedding_length") // facts.count("attention.head_count")


def phi_3(facts: GgufFacts) -> Settings:
    """A part of each head is turned, by factors for long and for short texts where the file has them."""
    dim = _width_of_heads(facts)
    long, short = facts.factors("rope_factors_long.weight"), facts.factors("rope_factors_short.weight")
    positions = partly(facts, dim, dim)
    original = facts.count("rope.scaling.original_context_length", facts.count("context_length"))
    if long and short:
        positions |= {"rope_type": "longrope", "long_factor": [*long], "short_factor": [*short]}
        positions |= {"original_max_position_embeddings": original}
    window = facts.count("attention.sliding_window", 0, least=0)
    settings = {
        **basics(facts, positions),
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }
    return {name: value for name, value in settings.items() if name != "head_dim"}


def glm_4(facts: GgufFacts) -> Settings:
    """Half of each head is turned."""
    positions = partly(facts, head_dim(facts), head_dim(facts) // 2)
    return {**basics(facts, positions), "attention_bias": "blk.0.attn_q.bias" in facts.tensors}


def granite(facts: GgufFacts) -> Settings:
    """Llama with four multipliers."""
    return {
        **llama(facts),
        "attention_multiplier": facts.real("attention.scale", 1.0),
        "embedding_multiplier": facts.real("embedding_scale", 1.0),
        "residual_multiplier": facts.real("residual_scale", 1.0),
        "logits_scaling": facts.real("logit_scale", 1.0),
    }


def gpt_oss(facts: GgufFacts) -> Settings:
    """The range of positions that YaRN turns between is not rounded, in the published models."""
    positions = rope(facts)
    if positions["rope_type"] == "yarn":
        positions["truncate"] = False
    return {
        **basics(facts, positions),
        "num_local_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
        "intermediate_size": facts.count("expert_feed_forward_length"),
        "sliding_window": facts.count("attention.sliding_window"),
        "layer_types": ["full_attention" if index % 2 else "sliding_attention" for index in range(facts.layers)],
        "attention_bias": True,
    }


def by_sigmoid(facts: GgufFacts) -> bool:
    """Whether experts of a deepseek2 file are chosen by sigmoids (V3) instead of softmax (V2)."""
    corrected = any(name.endswith("exp_probs_b.bias") for name in facts.tensors)
    return facts.count("expert_gating_func", SIGMOID if corrected else SOFTMAX) == SIGMOID


def deepseek_3(facts: GgufFacts) -> Settings:
    """Latent attention: keys and values of all heads from one latent, or in older files as the module keeps them."""
    rotated = facts.count("rope.dimension_count")
    apart = "_mla" if facts.has("attention.key_length_mla") else ""
    key = facts.count(f"attention.key_length{apart}") - rotated
    positions = rope(facts, rotated)
    if "mscale_all_dim" in positions:  # ten times as much in the published settings, which have both and the same
        positions |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * facts.real(LOG_MULTIPLIER), 6))
    groups, used = facts.count("expert_group_count", 1), facts.count("expert_group_used_count", 1)
    ranks = "attention.q_lora_rank"
    found = {
        **basics(facts, positions),
        "num_key_value_heads": facts.count("attention.head_count"),
        "kv_lora_rank": facts.count("attention.kv_lora_rank"),
        "q_lora_rank": facts.count(ranks) if facts.has(ranks) else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key,
        "v_head_dim": facts.count(f"attention.value_length{apart}"),
        "first_k_dense_replace": facts.count("leading_dense_block_count", 0, least=0),
        "n_routed_experts": facts.count("expert_count"),
        "num_experts_per_tok": facts.count("expert_used_count"),
        "n_shared_experts": facts.count("expert_shared_count", 0, least=0),
        "moe_intermediate_size": facts.count("expert_feed_forward_length"),
        "n_group": groups,
        "topk_group": used,
        "routed_scaling_factor": facts.real("expert_weights_scale", 1.0),
        "norm_topk_prob": facts.flag("expert_weights_norm"),
        "num_nextn_predict_layers": 0,
    }
    return {name: value for name, value in found.items() if name != "head_dim"}


def deepseek_2(facts: GgufFacts) -> Settings:
    """The same; its experts may come in groups."""
    found = deepseek_3(facts)
    grouped = found["n_group"] != 1
    return {**found, "topk_method": "group_limited_greedy" if grouped else "greedy"}


def qwen_35(facts: GgufFacts) -> Settings:
    """Layers of a gated delta rule, and every fourth with attention unless the file says which."""
    interval = facts.count("full_attention_interval", 4)
    usual = [int((index + 1) % interval != 0) for index in range(facts.layers)]
    recurrent = facts.each("attention.recurrent_layers") if facts.has("attention.recurrent_layers") else usual
    values = facts.count("ssm.time_step_rank")
    positions = partly(facts, head_dim(facts), head_dim(facts) // 4)
    if facts.has("rope.dimension_sections"):
        positions["mrope_section"] = [*facts.numbers("rope.dimension_sections")[:3]]
    return {
        **basics(facts, positions),
        "layer_types": ["linear_attention" if one else "full_attention" for one in recurrent],
        "linear_conv_kernel_dim": facts.count("ssm.conv_kernel"),
        "linear_key_head_dim": facts.count("ssm.state_size"),
        "linear_num_key_heads": facts.count("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": facts.count("ssm.inner_size") // values,
    }


def qwen_35_moe(facts: GgufFacts) -> Settings:
    """The same with experts, and one that all rows go through."""
    shared = facts.shape("blk.0.ffn_up_shexp.weight")[0]
    return {**qwen_35(facts), **_mixture(facts), "shared_expert_intermediate_size": shared}


def qwen_3_next(facts: GgufFacts) -> Settings:
    """The same, of an earlier family."""
    found = qwen_35_moe(facts)
    return {**found, "norm_topk_prob": True, "mlp_only_layers": []}


def gemma_4(facts: GgufFacts) -> Settings:
    """Layers of two kinds that differ in the size and the number of their heads; the last ones may share keys."""
    near = [bool(one) for one in facts.each("attention.sliding_window_pattern")]
    keys, widths = facts.each("attention.head_count_kv"), facts.each("feed_forward_length")
    far_keys = {count for count, one in zip(keys, near, strict=True) if not one}
    near_keys = {count for count, one in zip(keys, near, strict=True) if one} or far_keys
    shared = facts.count("attention.shared_kv_layers", 0, least=0)
    if len(far_keys) > 1 or len(near_keys) > 1 or {*widths} - {widths[0], 2 * widths[0]} or shared >= facts.layers:
        raise facts.refuse("has layers of more kinds than the two that are known here")
    turned = facts.factors("rope_freqs.weight")
    far_dim, near_dim = facts.count("attention.key_length"), facts.count("attention.key_length_swa")
    capped, experts = facts.has("final_logit_softcapping"), facts.has("expert_count")
    names = [f"blk.{index}" for index, one in enumerate(near) if not one and index < facts.layers - shared]
    rotated = sum(one == 1.0 for one in turned) if turned else far_dim // 2
    far_positions: Settings = {
        "rope_type": "proportional",
        "rope_theta": facts.real("rope.freq_base"),
        "partial_rotary_factor": 2 * rotated / far_dim,
    }
    near_positions: Settings = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    each_layer = facts.count("embedding_length_per_layer_input", 0, least=0)
    found: Settings = {
        **basics(facts, {"full_attention": far_positions, "sliding_attention": near_positions}, uniform=False),
        "intermediate_size": widths[0],
        "num_key_value_heads": next(iter(near_keys)),
        "num_global_key_value_heads": next(iter(far_keys), None),
        "head_dim": near_dim,
        "global_head_dim": far_dim,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in near],
        "sliding_window": facts.count("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": bool(names) and not any(f"{name}.attn_v.weight" in facts.tensors for name in names),
        "use_double_wide_mlp": widths[-1] != widths[0],
        "hidden_size_per_layer_input": each_layer,
        "final_logit_softcapping": facts.real("final_logit_softcapping") if capped else None,
        "enable_moe_block": experts,
    }
    if each_layer:
        found["vocab_size_per_layer_input"] = facts.shape("per_layer_token_embd.weight")[0]
    if experts:
        found |= {
            "num_experts": facts.count("expert_count"),
            "top_k_experts": facts.count("expert_used_count"),
            "moe_intermediate_size": facts.count("expert_feed_forward_length"),
        }
    return found
