"""A Llama checkpoint as the GGUF file that llama.cpp reads, in F16, Q8_0 or Q4_0, with the same weights.

Knows plain Llama alone, and byte-level BPE tokenizers. Embeddings and head are in Q8_0 where layers are in few bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

FORMS = {"F16": (Type.F16, Type.F16), "Q8_0": (Type.Q8_0, Type.Q8_0), "Q4_0": (Type.Q4_0, Type.Q8_0)}  # layers, others
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SETTINGS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads", "key_length": "head_dim", "value_length": "head_dim",
    "layer_norm_rms_eps": "rms_norm_eps", "rope_dimension_count": "head_dim", "vocab_size": "vocab_size",
}  # fmt: skip


def write_twin(folder: Path, form: str, out: Path) -> None:
    """Write the file. Raises ValueError for a model of another kind."""
    config = AutoConfig.from_pretrained(folder)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type != "llama" or biased or config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"{folder} is no plain Llama model (type {config.model_type}); others have no twin yet")
    part = out.with_name(f"{out.name}.part")
    writer = gguf.GGUFWriter(part, "llama", use_temp_file=True)
    _describe(writer, config, json.loads((folder / "tokenizer.json").read_text()))
    for name, weight in _tensors(folder):
        place, matrix = _place(name), weight.dim() == 2
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, config.head_dim)
        kind = FORMS[form][not place.startswith("blk.")] if matrix else Type.F32
        numbers: NDArray[np.float32] = weight.float().numpy()
        writer.add_tensor(place, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a handle, no dictionary
                yield name, shard.get_tensor(name)


def _place(name: str) -> str:
    """The name of a tensor in GGUF files of this architecture."""
    base, _, kind = name.rpartition(".")
    if base in REST:
        return f"{REST[base]}.{kind}"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def _interleaved(weight_OI: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of each head so that the two numbers of a rotated pair are neighbours, as ggml rotates them."""
    return weight_OI.view(-1, 2, head // 2, weight_OI.shape[1]).transpose(1, 2).reshape(weight_OI.shape)


def _describe(writer: gguf.GGUFWriter, config: PretrainedConfig, tokenizer: dict[str, dict[str, object]]) -> None:
    for setting, number in SETTINGS.items():
        getattr(writer, f"add_{setting}")(getattr(config, number))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    assert isinstance(vocabulary, dict)
    assert isinstance(merges, list)
    tokens = {token: text for text, token in vocabulary.items()}
    written = [tokens.get(token, f"[unused {token}]") for token in range(config.vocab_size)]
    kinds = [gguf.TokenType.NORMAL if token in tokens else gguf.TokenType.UNUSED for token in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(written)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    end = config.eos_token_id
    writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
