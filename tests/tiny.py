"""Tiny random checkpoints of every architecture we promise to run. Knows nothing of offload.

`tiny("llama", path)` saves a float32 folder as a real model is saved and returns the transformers model that it holds.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from specexec.model.linears.row_tiles import RowTiles

Option = int | float | bool | str | None | list[str] | list[int] | list[float] | dict[str, "Option"]

WINDOW = 8
LAYERS = 4
VOCABULARY = 256

BASE: dict[str, Option] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ALTERNATING: list[str] = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# family → config class and what differs from BASE; None takes a key of BASE away.
FAMILIES: dict[str, tuple[str, dict[str, Option]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_rope_llama3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_rope_yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "head_dim": None,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
    ),
}
# Keys of BASE that these config classes do not know, and would keep as stray attributes.
UNKNOWN: dict[str, set[str]] = {
    "gpt_neox": {"num_key_value_heads", "head_dim"},
    "opt": {"num_key_value_heads", "head_dim", "intermediate_size"},
    "deepseek_v3": {"head_dim"},
    "phi3": {"head_dim"},
}


SAVED = ("config.json", "generation_config.json", "model*.safetensors*")  # what save_pretrained writes
MOST_KEPT_B = 1 << 20


@dataclass(frozen=True)
class _Made:
    """A model as it was saved."""

    model: PreTrainedModel
    files: dict[str, bytes]


_MADE: dict[str, _Made] = {}


def tiny_config(family: str, **overrides: Option) -> PreTrainedConfig:
    """The config of `family` in its tiny shape; overrides win."""
    class_name, difference = FAMILIES[family]
    options = {key: value for key, value in BASE.items() if key not in UNKNOWN.get(family, set())}
    options |= {key: value for key, value in difference.items() if key not in UNKNOWN.get(family, set())}
    config_class: Callable[..., PreTrainedConfig] = getattr(transformers, class_name)
    return config_class(**(options | overrides))


def tiny(
    family: str, path: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Option
) -> PreTrainedModel:
    """Save a tiny random float32 checkpoint of `family` at `path`, weights drawn so that logits are far from flat.

    Each is made once in a process and copied from then on, which takes a quarter of the time.
    """
    asked = json.dumps([family, seed, max_shard_size, overrides], sort_keys=True)
    if asked in _MADE:
        made = _MADE[asked]
        path.mkdir(parents=True, exist_ok=True)
        for name, content in made.files.items():
            (path / name).write_bytes(content)
        return copy.deepcopy(made.model)
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, seed)
    model.eval()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    files = [file for pattern in SAVED for file in path.glob(pattern)]
    if sum(file.stat().st_size for file in files) < MOST_KEPT_B:
        _MADE[asked] = _Made(copy.deepcopy(model), {file.name: file.read_bytes() for file in files})
    return model


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight anew with std 1.3/sqrt(fan): masks, positions and windows then move logits by whole units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                # Fused experts are 3-D and multiply from either side; the smaller fan keeps both orders lively.
                fan = min(parameter.shape[-2:]) if parameter.dim() == 3 else parameter.shape[-1]
                parameter.normal_(0.0, 1.3 / fan**0.5, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """One plain forward, in tiles of rows: some CPUs' bits of a single row depend on where its weights begin."""
    with RowTiles():
        found: torch.Tensor = model(tokens).logits
    return found


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """bitsandbytes multiplies in bfloat16 where a CPU can, float32 too; this model does not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - typed as a Tensor
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """What transformers itself writes: the prompt and `count` tokens."""
    # transformers' own annotations do not let strict mode call it.
    generate: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009
    return generate(tokens, max_new_tokens=count, do_sample=False)
