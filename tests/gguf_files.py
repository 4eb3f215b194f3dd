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
from transformers import PreTrainedModel
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
}
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
        blocks = kind if values.ndim > 1 and "ffn_gate_inp" not in tensor else Kind.F32
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
        found = table.get_name(place, (".weight", ".bias"))
        assert found, place
        values = tensor.float().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(found.split(".")[-2])
        if name in IN_TURNS and heads:
            shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))
        if config.model_type.startswith("gemma") and place.endswith("norm.weight"):
            values = values + 1
        if place.endswith("shared_expert_gate.weight"):
            values = values[0]
        yield found, values
    if config.rope_parameters.get("rope_type") == "llama3":
        rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        yield "rope_freqs.weight", (plain / rotary.inv_freq).numpy()


def separate(tensors: Mapping[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Fused experts apart, as gguf-py's table has them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not re.search(r"mlp\.gate\.weight|shared_expert_gate", name):
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded.reshape(parameter.shape)))
            if model.config.model_type.startswith("gemma") and name.endswith("norm.weight"):
                parameter.copy_((parameter + 1) - 1)  # a file holds the sum
    return model


def _write_settings(writer: gguf.GGUFWriter, name: str, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
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
    if experts := getattr(config, "num_experts", getattr(config, "num_local_experts", None)):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if name in ("gemma2", "gemma3", "phi3"):
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
