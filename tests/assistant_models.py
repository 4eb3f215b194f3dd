"""Small Gemma 4 targets and assistants for them, with drawn weights, as transformers saves both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.tiny import VOCABULARY, redraw
from tests.zoo import tiny_of

CLUSTERS, BEST = 32, 5


def assistant_of(target: PreTrainedModel, folder: Path, ordered: bool = False, seed: int = 3) -> PreTrainedModel:
    """Three layers of 32 numbers, the last one full, whose heads are those of the target's keys."""
    text = target.config.get_text_config()
    told = text.to_dict() | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "enable_moe_block": False,
        "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    }  # fmt: skip
    told.pop("per_layer_config")
    config = Gemma4AssistantConfig(
        text_config=type(text).from_dict(told), backbone_hidden_size=text.hidden_size, use_ordered_embeddings=ordered,
        num_centroids=CLUSTERS, centroid_intermediate_top_k=BEST,
    )  # fmt: skip
    with patch.object(Gemma4TextConfig, "kv_sharing_modes", ["reuse"] * 3):  # 5.23 refuses its own class otherwise
        model = Gemma4AssistantForCausalLM(config).float()
    redraw(model, seed)
    if ordered:
        order = torch.randperm(config.get_text_config().vocab_size, generator=torch.Generator().manual_seed(seed))
        model.masked_embedding.token_ordering.copy_(order)
    model.eval().save_pretrained(folder)
    return model


def gemma(folder: Path, vocabulary: int = VOCABULARY, shared: int = 0) -> PreTrainedModel:
    """A target of four layers, of which the last `shared` have no keys of their own; windows of eight tokens."""

    def sized(config: PreTrainedConfig) -> None:
        text = config.get_text_config()
        text.vocab_size = text.vocab_size_per_layer_input = vocabulary
        text.num_kv_shared_layers = shared

    with hands_on() if not shared else nullcontext():
        return tiny_of("gemma4_text", folder, change=sized)


def hands_on() -> AbstractContextManager[object]:
    """A model without shared keys hands on those that assistants read, as transformers 5.23 promises and does not."""
    return patch.object(Gemma4TextConfig, "kv_sharing_modes", [None, None, "store", "store"])
