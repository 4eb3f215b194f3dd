"""Tiny GGUF files, written by gguf-py as llama.cpp's converter would write them. Knows nothing of offload.

Names come from gguf-py's own table, values are changed as conversion/*.py of llama.cpp says; `dense_of` gives the model
that a file stands for, with weights that gguf-py dequantised.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

Kind = gguf.GGMLQuantizationType
# Bytes that no text holds make room for a word and a control token.
WORD, END = "he", "<|end|>"
# ggml's names of transformers' model types, where they differ.
ARCHITECTURES = {
    "mixtral": "llama",
    "mistral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}
DELTA = ("qwen3next", "qwen35", "qwen35moe")
"""Architectures with layers of a gated delta rule."""
IN_TURNS = ("llama", "granite")
"""Architectures whose rows of queries and keys are written in turns."""


def architecture_of(model: PreTrainedModel) -> str:
    """ggml's name of what a model is."""
    kind = str(model.config.model_type)
    return ARCHITECTURES.get(kind, kind)


def write_gguf(
    model: PreTrainedModel, file: Path, kind: Kind = Kind.F32, *, split: int = 0, pre: str = "gpt-2", big: bool = False
) -> Path:
    """`model` as a GGUF file, its matrices in `kind`; with `split`, so many tensors a file. The (first) file."""
    name = architecture_of(model)
    endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(file, name, endianess=endian, split_max_tensors=split)
    _write_settings(writer, name, model)
    _write_tokenizer(writer, model.config.vocab_size, pre)
    for tensor, values in stored(model):
        whole = values.ndim < 2 or not tensor.endswith(".weight") or re.search("ffn_gate_inp|ssm_conv1d", tensor)
        blocks = Kind.F32 if whole else kind
        writer.add_tensor(tensor, gguf.quantize(values, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(file.parent.glob(f"{file.stem}*.gguf"))))


def stored(model: PreTrainedModel) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor under ggml's name, as the converter changes it."""
    config = model.config
    name = architecture_of(model)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for place, tensor in separate(model.state_dict(), config.model_type).items():
        if place == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for renamed, changed in converted(name, place, tensor.float(), config):
            found = table.get_name(renamed, (".weight", ".bias", ".scale"))
            assert found, renamed
            values = changed.contiguous().numpy()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
                found.split(".")[-2]
            )
            if name in IN_TURNS and heads:
                shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))
            if plus_1(name, renamed):
                values = values + 1
            if renamed.endswith("shared_expert_gate.weight"):
                values = values[0]
            yield found, values
    if name == "gemma4":
        rotated = config.global_head_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2
        yield (
            "rope_freqs.weight",
            np.array([1.0] * int(rotated) + [1e30] * (config.global_head_dim // 2 - int(rotated))),
        )
    if config.rope_parameters.get("rope_type") == "llama3":
        rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        yield "rope_freqs.weight", (plain / rotary.inv_freq).numpy()


def plus_1(name: str, place: str) -> bool:
    """Whether norms are written one larger."""
    larger = name in DELTA or (name.startswith("gemma") and name != "gemma4")
    return larger and place.endswith("norm.weight") and not place.endswith("linear_attn.norm.weight")


def converted(
    name: str, place: str, tensor: torch.Tensor, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor as the converter names and changes it, in one piece or in several."""
    if name == "gpt-oss" and ".experts." in place:
        base, _, last = place.removesuffix(".weight").rpartition(".")
        kind = "bias" if last.endswith("_bias") else "weight"
        values = tensor if kind == "bias" else tensor.transpose(1, 2)
        if last.startswith("down"):
            yield f"{base}.down_proj.{kind}", values
        else:
            yield f"{base}.gate_proj.{kind}", values[:, ::2]
            yield f"{base}.up_proj.{kind}", values[:, 1::2]
    elif name == "deepseek2" and place.endswith("kv_b_proj.weight"):
        key, value = config.qk_nope_head_dim, config.v_head_dim
        k_b, v_b = tensor.view(-1, key + value, tensor.shape[1]).split([key, value], dim=1)
        yield place.replace("kv_b", "k_b"), k_b.transpose(1, 2)
        yield place.replace("kv_b", "v_b"), v_b
    elif name in DELTA and ".linear_attn." in place:
        yield from of_delta(name, place, tensor, config)
    elif place.endswith(("sinks", "layer_scalar")):
        yield f"{place}.weight", tensor
    elif place.endswith("e_score_correction_bias"):
        yield place.replace("correction_bias", "correction.bias"), tensor
    elif place.endswith("router.scale"):
        yield place.replace("router.scale", "router.proj.scale"), tensor
    elif place.endswith("router.per_expert_scale"):
        yield place.replace("router.per_expert_scale", "experts.down_proj.scale"), tensor
    else:
        yield place, tensor


def of_delta(
    name: str, place: str, tensor: torch.Tensor, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a gated delta rule; of qwen35 the value heads come key head by key head in turns."""
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    size, wide = config.linear_key_head_dim, each * config.linear_value_head_dim

    def in_turns(values: torch.Tensor) -> torch.Tensor:
        if name == "qwen3next":
            return values
        return values.reshape(keys, each, -1, *values.shape[1:]).transpose(0, 1).reshape(values.shape)

    if place.endswith("A_log"):
        yield place, in_turns(-tensor.exp())
    elif place.endswith("dt_bias"):
        yield place.replace("dt_bias", "dt_proj.bias"), in_turns(tensor)
    elif place.endswith(("conv1d.weight", "in_proj_qkv.weight")):
        rows = tensor.squeeze(1)
        yield place, torch.cat((rows[: 2 * keys * size], in_turns(rows[2 * keys * size :])))
    elif place.endswith("in_proj_qkvz.weight"):
        parts = tensor.view(keys, -1, tensor.shape[1]).split([size, size, wide, wide], dim=1)
        q, k, v, z = (part.reshape(-1, tensor.shape[1]) for part in parts)
        base = place.removesuffix("in_proj_qkvz.weight")
        yield f"{base}in_proj_qkv.weight", torch.cat((q, k, v))
        yield f"{base}in_proj_z.weight", z
    elif place.endswith("out_proj.weight"):
        yield place, in_turns(tensor.T).T
    elif place.endswith(("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight")):
        yield place, in_turns(tensor)
    else:
        yield place, tensor


def separate(tensors: Mapping[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Fused experts apart, as gguf-py's table has them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if model_type in ("gpt_oss", "gemma4_text"):  # which gguf-py's table has as they are
            found[f"{name}.weight" if re.search(r"\.experts\.\w+_proj$", name) else name] = tensor
        elif name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            base = name.removesuffix("gate_up_proj")
            found |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = tensor
        else:
            found[name] = tensor
    if model_type == "mixtral":
        return {name.replace("mlp.gate.", "block_sparse_moe.gate."): tensor for name, tensor in found.items()}
    return found


def dense_of(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """The model with every matrix that a file has in `kind` rounded as gguf-py does; in place."""
    name = architecture_of(model)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            # Blocks lie along the rows of the file.
            for stored_rows in rows_of(name, place, parameter, model.config):
                rounded = gguf.dequantize(gguf.quantize(stored_rows.contiguous().numpy(), kind), kind)
                stored_rows.copy_(torch.from_numpy(rounded.reshape(stored_rows.shape)))
            if plus_1(name, place):
                parameter.copy_((parameter + 1) - 1)  # a file holds the sum
            if place.endswith("A_log"):
                parameter.copy_(torch.log(parameter.exp()))
    return model


def rows_of(name: str, place: str, parameter: torch.Tensor, config: PreTrainedConfig) -> list[torch.Tensor]:
    """The matrix as the file has its rows, in pieces; nothing of what stays whole."""
    if parameter.dim() < 2 or re.search(r"mlp\.gate\.weight|shared_expert_gate|router|conv1d|_bias$", place):
        return []
    if name == "gpt-oss" and ".experts." in place:
        return [parameter.transpose(1, 2)]
    if place.endswith("kv_b_proj.weight"):
        key = config.qk_nope_head_dim
        by_head = parameter.view(-1, key + config.v_head_dim, parameter.shape[1])
        return [by_head[:, :key].transpose(1, 2), by_head[:, key:]]
    return [parameter]


def _write_settings(writer: gguf.GGUFWriter, name: str, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    if name in SETTINGS:
        SETTINGS[name](writer, config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if name != "qwen35moe":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if name not in ("gemma4", "deepseek2"):
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if name in ("llama", "granite"):
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if name in ("qwen3", "qwen3moe", "gemma", "gemma2", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if experts := next(filter(None, (getattr(config, one, None) for one in EXPERTS)), None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(getattr(config, "num_experts_per_tok", None) or config.top_k_experts)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name in ("gemma2", "gemma3", "gemma4", "gpt-oss", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if name == "glm4":
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _gpt_oss(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _deepseek_2(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if "mscale_all_dim" in config.rope_parameters:
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])


def _delta(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(4)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))


def _gemma_4(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    near = [kind == "sliding_attention" for kind in config.layer_types]
    far_keys = config.num_global_key_value_heads or config.num_key_value_heads
    writer.add_head_count_kv([config.num_key_value_heads if one else far_keys for one in near])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern(near)
    writer.add_key_length(config.global_head_dim)
    writer.add_value_length(config.global_head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(config.global_head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


SETTINGS = {
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek_2,
    **dict.fromkeys(DELTA, _delta),
    "gemma4": _gemma_4,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _write_tokenizer(writer: gguf.GGUFWriter, vocabulary: int, pre: str) -> None:
    letters = bytes_to_unicode()
    tokens = [letters[byte] for byte in range(254)] + [WORD, END] + [f"[PAD{n}]" for n in range(256, vocabulary)]
    kinds = [gguf.TokenType.NORMAL] * 255 + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * (vocabulary - 256)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(255)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
