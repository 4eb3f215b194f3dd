"""Every architecture of GGUF files computes what transformers computes with the same weights, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

import offload
from offload.errors import UnsupportedModel
from tests.gguf_files import Kind, dense_of, write_gguf
from tests.tiny import BASE, logits_of, redraw, tiny

PROMPT = torch.arange(2, 32)[None]
SCALED: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
LLAMA_3: dict[str, Any] = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIX_LAYERS: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
ANY: dict[str, Any] = {**BASE}
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def of(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, 0)
    return model.eval()


def granite(folder: Path) -> PreTrainedModel:
    multipliers = {f"{name}_multiplier": 0.5 + n for n, name in enumerate(("attention", "embedding", "residual"))}
    options: dict[str, Any] = {**BASE, **multipliers, "logits_scaling": 3.0}
    return of(GraniteConfig(**options))


MODELS = {
    "tied": lambda folder: tiny("llama_tied", folder),
    "llama3": lambda folder: tiny("llama", folder, rope_parameters=LLAMA_3),
    "linear": lambda folder: tiny("llama", folder, rope_parameters=SCALED),
    "yarn": lambda folder: tiny("llama_rope_yarn", folder),
    "mistral": lambda folder: tiny("mistral", folder, sliding_window=None),
    "mixtral": lambda folder: tiny("mixtral", folder),
    "qwen2": lambda folder: tiny("qwen2", folder),
    "qwen3": lambda folder: tiny("qwen3", folder, head_dim=32),
    "qwen2_moe": lambda folder: of(Qwen2MoeConfig(**ANY, **MIXTURE, shared_expert_intermediate_size=32)),
    "qwen3_moe": lambda folder: tiny("qwen3_moe", folder, **MIXTURE, norm_topk_prob=True),
    "gemma": lambda folder: of(GemmaConfig(**{**ANY, "tie_word_embeddings": True})),
    "gemma2": lambda folder: tiny("gemma2", folder),
    "gemma3": lambda folder: tiny("gemma3_text", folder, **SIX_LAYERS),
    "phi3": lambda folder: tiny("phi3", folder),
    "glm4": lambda folder: of(Glm4Config(**ANY)),
    "glm4_biases": lambda folder: of(Glm4Config(**ANY, attention_bias=True)),
    "granite": granite,
}


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    dense = MODELS[name](tmp_path / "dense")
    file = write_gguf(dense, tmp_path / "tiny.gguf", Kind.Q8_0)
    expected = logits_of(dense_of(dense, Kind.Q8_0), PROMPT)
    for tier in ("none", "disk"):
        assert torch.equal(logits_of(offload.load(file, tier, dtype="f32"), PROMPT), expected), tier


def test_positions_that_a_config_cannot_say_are_refused(tmp_path: Path) -> None:
    other: dict[str, Any] = {**LLAMA_3, "original_max_position_embeddings": 64}
    file = write_gguf(tiny("llama", tmp_path / "dense", rope_parameters=other), tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModel, match=r"not those of Llama 3\.1"):
        offload.open_folder(file)
