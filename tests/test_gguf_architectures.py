"""Every architecture of GGUF files computes what transformers computes with the same weights, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

import offload
from offload.checkpoint.entry import Entry, Strides
from offload.checkpoint.layout import lay_out
from offload.checkpoint.mapping import route
from offload.checkpoint.skeleton import build
from offload.errors import BadModelDir, UnsupportedModel
from offload.packs.pack import pack, plan
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


LATENT: dict[str, Any] = {
    **MIXTURE, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# A value head is a block wide, so that blocks are the same in either order of the heads.
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
GEMMA_4: dict[str, Any] = {
    "tie_word_embeddings": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 256, "global_head_dim": 32,
}  # fmt: skip
GEMMA_4_SMALL: dict[str, Any] = {
    **GEMMA_4, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA_4_EXPERTS: dict[str, Any] = {
    **GEMMA_4, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
    "moe_intermediate_size": 64,
}  # fmt: skip


def tiny_of(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """What config.json holds no more and the writer needs stays with the config."""
    config = CONFIG_MAPPING[model_type](**{**ANY, **settings})
    config.allow_global_per_layer_attribute_access = True
    for name in ("global_head_dim", "num_global_key_value_heads"):
        setattr(config, name, settings.get(name))
    return of(config)


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
    "gpt_oss": lambda folder: tiny("gpt_oss", folder, rope_parameters={**YARN, "truncate": False}),
    "deepseek_v2": lambda _: tiny_of("deepseek_v2", {**LATENT, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": lambda _: tiny_of(
        "deepseek_v3",
        {**LATENT, "n_group": 2, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "qwen35": lambda _: tiny_of("qwen3_5_text", DELTA),
    "qwen35moe": lambda _: tiny_of("qwen3_5_moe_text", {**DELTA, **MIXTURE, "shared_expert_intermediate_size": 32}),
    "qwen3next": lambda _: tiny_of("qwen3_next", {**DELTA, **MIXTURE, "shared_expert_intermediate_size": 32}),
    "gemma4": lambda _: tiny_of("gemma4_text", GEMMA_4_SMALL),
    "gemma4_experts": lambda _: tiny_of("gemma4_text", GEMMA_4_EXPERTS),
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


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss in Q8_0."""
    path = tmp_path_factory.mktemp("gpt_oss")
    return write_gguf(MODELS["gpt_oss"](path / "dense"), path / "tiny.gguf", Kind.Q8_0)


def test_experts_that_share_a_tensor_with_others_are_fetched_one_by_one(gpt_oss: Path) -> None:
    folder = offload.open_folder(gpt_oss)
    layer = lay_out(folder, build(folder, "f32")).layers[0]
    assert layer.routing
    whose = {one.name: {part.expert for part in one.parts} for one in layer.pieces if ".experts." in f".{one.name}"}
    assert len(whose) == 5  # codes of gates, of what they act on and of the way down, and two tensors of biases
    assert all(found == {0, 1, 2, 3} for found in whose.values()), whose


def test_a_pack_holds_parts_of_tensors_and_their_places(gpt_oss: Path, tmp_path: Path) -> None:
    pack(plan(offload.open_folder(gpt_oss), "none"), tmp_path / "pack")
    expected = logits_of(offload.load(gpt_oss, "none", dtype="f32"), PROMPT)
    assert torch.equal(logits_of(offload.load(tmp_path / "pack", "disk", dtype="f32"), PROMPT), expected)
    good = Strides.all_of(4, 64, 2).at(2, 0)
    for wrong in (
        Strides(good.sizes, good.steps, 1 << 20),
        Strides(good.sizes, (128, 1 << 40)),
        Strides((4, 8), (128, 2)),
    ):
        entry = Entry(wrong.behind("model.layers.0.mlp.experts.gate_up_proj_bias"), gpt_oss, 0, 1024, "F32", (4, 64))
        with pytest.raises(BadModelDir, match="does not fit"):
            route([entry], build(offload.open_folder(gpt_oss), "f32").whole)
