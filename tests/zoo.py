"""Tiny random checkpoints of any model type of transformers, made from its own defaults; and what works with them.

`tiny_of("qwen3_vl", folder)` saves one as a repository would and returns transformers' own model of it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.skeleton import SUPPORTED
from offload.checkpoint.wrapper import towers_optional, wrapper_class
from offload.errors import OffloadError
from specexec.compose.gate import admit
from specexec.drafters.none import NoDrafter
from specexec.errors import SpecexecError, UnsupportedArchitecture
from specexec.model.architecture import check_tree_support
from specexec.model.cache import KVCache
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import LAYERS, VOCABULARY, WINDOW, redraw
from tests.writing import greedy, prompt, write

# The last ids stand for images, sounds and ends.
MOST = 200
TEXTS = [prompt(5, seed=1, most=MOST), prompt(30, seed=2, most=MOST)]
# Sizes by the names that configs give them.
SIZES: dict[str, object] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "d_ff"), 64),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_window_size", "attention_chunk_size"), WINDOW),
    "hidden_size_per_layer_input": 8, "qk_rope_head_dim": 8, "qk_head_dim": 24, "kv_lora_rank": 16, "q_lora_rank": 32,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "rotary_dim": 8, "num_kv_shared_layers": 2, "window_size": WINDOW, "attn_layer_period": 2, "attn_layer_offset": 1,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_num_heads": 4, "mamba_head_dim": 32, "mamba_d_state": 16,
    "mamba_d_ssm": 128, "mamba_n_groups": 1, "n_groups": 1, "ssm_state_size": 16, "state_size": 16,
    "depth": 2, "image_size": 28, "num_position_embeddings": 64, "floor_scale": 4,
    "index_head_dim": 16, "index_topk": 12,
    "index_topk_blocks": 3, "index_block_size": 4,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
}  # fmt: skip
# Of each layer there is one entry; those that count layers name the first ones.
BY_LAYER = (
    "mlp_layer_types", "no_rope_layers", "layers_block_type", "activation_sparsity_pattern", "attention_layers",
    "attn_type_list", "layer_group_attention_types", "block_types", "num_attention_heads_per_layer",
    "kv_source_layers",
)  # fmt: skip
# What defaults leave out and repositories have: a tower of images, two sizes of heads, layers that share their keys.
GEMMA4 = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
M3 = {
    "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3], "num_key_value_heads": 2,
}  # fmt: skip
COMPASS = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
SPEECH: dict[str, object] = {
    "has_lora_adapter": False, "encoder_config": {"hidden_dim": 64}, "projector_config": {"encoder_hidden_size": 64}
}  # fmt: skip
QWEN4: dict[str, object] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 12,
    "indexer_compress_ratio": 4, "ple_layer_ids": [],
}  # fmt: skip
MORE: dict[str, dict[str, object]] = {
    "gemma4": {"vision_config": CONFIG_MAPPING["gemma4_vision"]().to_dict(), "text_config": GEMMA4 | GEMMA4_MOE},
    "gemma4_text": dict(GEMMA4),
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": dict(GEMMA4),
    "bamba": {"attn_layer_indices": [1]},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
    },
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_expert_group": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": M3,
    "minimax_m3_vl": {"text_config": M3},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass": {"text_config": {"rope_parameters": COMPASS}},
    "cohere_compass_text": {"rope_parameters": COMPASS},
    "cosmos3_edge": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 200, "<image>": 255}, "vq_config": {"base_channels": 32}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "granite_speech": SPEECH,
    "granite_speech_plus": SPEECH,
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus": {
        "vision_config": {"projection_dim": 64},
        "vq_config": {"projection_dim": 64, "image_token_embed_dim": 64, "num_embeddings": 64, "base_channels": 32},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "muse_spark": {"projector_hidden_size": 64, "audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4}},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": 64}},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCABULARY - 3},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 3},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "rwkv": {"attention_hidden_size": 64},
    "step3p7": {"text_config": {"sliding_window": 512, "num_sliding_attention_heads": 4}},
    "xlm": {"emb_dim": 64},
    "xlnet": {"d_head": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128},
}
# What is to stay as it is among sizes.
EXACT: dict[str, dict[str, object]] = {
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attention_head_dim": 32},
}


def tiny_of(
    model_type: str, folder: Path, seed: int = 0, change: Callable[[PreTrainedConfig], None] = lambda _: None
) -> PreTrainedModel:
    """A checkpoint in `folder` as transformers saves it, in float32, and the model that it holds."""
    config = shrunk(model_type)
    change(config)
    of_text = config.get_text_config() is config
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if of_text else wrapper_class(config)
    assert model_class is not None, f"{model_type} writes no text"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make: Callable[..., PreTrainedModel] = getattr(model_class, "_from_config")  # noqa: B009
        with init_empty_weights(), towers_optional():
            weights = sum(parameter.numel() for parameter in make(config).parameters())
        assert weights < MOST_WEIGHTS, f"{weights} weights are not tiny: a size has an unknown name"
        with towers_optional():
            model = make(config, dtype=torch.float32)
    redraw(model, seed)
    if not of_text:
        # The last id stands for an image, which wrappers read as a place for one: it is never written.
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
                    head.weight[-1] = 0.0
    model.eval()
    model.save_pretrained(folder)
    return model


def shrunk(model_type: str) -> PreTrainedConfig:
    """The architecture in its tiny shape, with a layer of each kind."""
    told = CONFIG_MAPPING[model_type]().to_dict()
    told = _with(told, MORE.get(model_type, {}))
    return CONFIG_MAPPING[model_type].from_dict(_with(_shrunk(told), EXACT.get(model_type, {})))


def _with(told: Mapping[str, object], more: Mapping[str, object]) -> dict[str, object]:
    """Settings, and those that differ from them."""
    found = dict(told)
    for name, value in more.items():
        beside = found.get(name)
        found[name] = _with(beside, value) if isinstance(value, dict) and isinstance(beside, dict) else value
    return found


def _shrunk(told: Mapping[str, object]) -> dict[str, object]:
    # Which layers differ is made anew for the layers that are left.
    small = {name: _size(str(name), value, told) for name, value in told.items() if name != "per_layer_config"}
    kinds = told.get("layer_types")
    if isinstance(kinds, list) and kinds:
        order = [*dict.fromkeys(kinds)]
        small["layer_types"] = [order[at % len(order)] for at in range(LAYERS)]
    for name in BY_LAYER:
        if isinstance(value := told.get(name), list) and value:
            small[name] = value[:LAYERS]
    if isinstance(value := told.get("moe_layers"), list):
        small["moe_layers"] = [layer for layer in value if layer < LAYERS]
    return small


def _size(name: str, value: object, beside: Mapping[str, object]) -> object:
    if isinstance(value, dict):
        return _settings(name, value, beside)
    if name == "num_key_value_heads" and isinstance(value, int):
        return 4 if value == beside.get("num_attention_heads") else 2
    if name.endswith(("token_id", "token_index")) and isinstance(value, int):
        # Padding is left out by `generate` wherever it stands in a prompt.
        return {"eos_token_id": None, "pad_token_id": VOCABULARY - 2}.get(name, min(value, VOCABULARY - 1))
    if name == "head_dim" and "expand" in beside:
        return 32  # of a recurrent layer, that is twice as wide as the model
    if name == "head_dim" and value is None and "num_attention_heads" in beside and "kv_lora_rank" not in beside:
        return 16
    if name == "intermediate_size" and isinstance(value, list):
        return [SIZES[name]] * LAYERS
    if name == "head_dim" and "qk_rope_head_dim" in beside:
        return 8 if value == beside["qk_rope_head_dim"] else 24 if value is not None else None
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return SIZES[name]
    return value


def _settings(name: str, value: dict[str, object], beside: Mapping[str, object]) -> dict[str, object]:
    if name.startswith("rope_") and "rope_type" in value and re.search("vl|glm4v|ocr|omni", str(beside["model_type"])):
        factor = value.get("partial_rotary_factor", 1.0)
        assert isinstance(factor, float)
        half = int(8 * factor)
        section = [half - 2 * (half // 3), half // 3, half // 3]
        return value | {"mrope_section": section[:: -1 if "ernie" in str(beside["model_type"]) else 1]}
    return value if name.startswith(("rope_", "id2", "label2")) else _shrunk(value)


Outcome = Literal["trees", "plain", "refused", "wrong", "error", "not tried"]
NODES = 12
PARENTS = [-1, -1, 0, 1, 1, 2, 4, 4, 5, 6, -1, 9]
PREFIX, LONG = 21, 280
CLOSE = 2e-3
MOST_WEIGHTS = 90_000_000
MOST_SAID = 200  # characters


@dataclass(frozen=True)
class Found:
    """What works with one model type, and why not more."""

    model_type: str
    outcome: Outcome
    why: str = ""


def types() -> list[str]:
    """Every model type that writes text after text: causal language models, and wrappers of one."""
    found = []
    for name in sorted(CONFIG_MAPPING):
        try:
            config = CONFIG_MAPPING[name]()
            text = config.get_text_config()
        except Exception:  # transformers' own defaults make no model of every type
            continue
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (text is not config and wrapper_class(config))
        if causal and not config.is_encoder_decoder:
            found.append(name)
    return found


def tried(model_type: str) -> Found:
    """Make one, stream it, and compare it with transformers' own class."""
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        folder = Path(made)
        try:
            truth = tiny_of(model_type, folder)
        except Exception as error:  # not ours: these defaults, this shape
            return Found(model_type, "not tried", f"transformers: {_first(error)}")
        try:
            expected = [greedy(truth, tokens, 8) for tokens in TEXTS]
        except Exception as error:  # it writes no text after text
            return _refused(model_type, folder) or Found(model_type, "not tried", f"transformers: {_first(error)}")
        why = ""
        try:
            design = admit(open_folder(folder), trees=False)
            try:
                check_tree_support(design.model_class, design.config)
                if far := _trees(folder, truth):
                    return Found(model_type, "wrong", far)
                return Found(model_type, "trees")
            except UnsupportedArchitecture as refusal:
                why = _first(refusal)
            lm = ChainLM(offload.load(folder, "none"))
            texts = write(lm, NoDrafter(), TEXTS, SamplingParams(temperature=0.0, max_tokens=8), budget=0)
            same = [sequence.answer for sequence in texts] == expected
            return Found(model_type, "plain", why) if same else Found(model_type, "wrong", "another text")
        except (OffloadError, SpecexecError) as refusal:
            return Found(model_type, "refused", _first(refusal))
        except Exception as error:
            return Found(model_type, "error", f"{type(error).__name__}: {_first(error)}")


def _refused(model_type: str, folder: Path) -> Found | None:
    try:
        admit(open_folder(folder), trees=False)
        offload.load(folder, "none")
    except (OffloadError, SpecexecError) as refusal:
        return Found(model_type, "refused", _first(refusal))
    return None


def _trees(folder: Path, truth: PreTrainedModel) -> str:
    """How far a tree below a prompt, and a prompt in pieces, are from transformers; empty if they are not."""
    lm = TreeLM(offload.load(folder, "none"))
    tokens, long = prompt(PREFIX + NODES, seed=3, most=MOST), prompt(LONG, seed=4, most=MOST)
    cache, nodes = KVCache(), tokens[PREFIX:]
    lm.forward([Rows(cache, tokens[:PREFIX], range(-1, PREFIX - 1))])
    cache.commit(range(PREFIX))
    (hidden,) = lm.forward([Rows(cache, nodes, PARENTS)])
    for node, ours in enumerate(lm.head(hidden)):
        path: list[int] = []
        above = node
        while above != -1:
            path.insert(0, nodes[above])
            above = PARENTS[above]
        theirs = truth(input_ids=torch.tensor([[*tokens[:PREFIX], *path]]), use_cache=False).logits[0, -1]
        if not torch.allclose(ours, theirs.float(), atol=CLOSE, rtol=CLOSE):
            return f"a node of a tree is off by {(ours - theirs).abs().max():.2g}"
    (hidden,) = lm.forward([Rows(KVCache(), long, range(-1, LONG - 1))])
    theirs = truth(input_ids=torch.tensor([long]), use_cache=False).logits[0].float()
    if not torch.allclose(lm.head(hidden), theirs, atol=CLOSE, rtol=CLOSE):
        return f"a prompt in pieces is off by {(lm.head(hidden) - theirs).abs().max():.2g}"
    return ""


def _first(error: BaseException) -> str:
    what = str(getattr(error, "what", None) or str(error) or type(error).__name__)
    why, _, _ = str(getattr(error, "why", None) or "").partition(SUPPORTED)
    words = re.sub(r"/tmp/\w+", "its folder", " ".join([what, why])).split()
    said = " ".join(words)
    return said if len(said) <= MOST_SAID else said[:MOST_SAID].rsplit(" ", 1)[0] + " …"
