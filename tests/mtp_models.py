"""Small targets with a layer of their own that guesses further ahead, saved under the names that publishers use.

`random_model`: every weight is drawn, so that a wrong norm, order or position moves logits. `chain_model`: what comes
next depends on the last token nearly alone, and the layer knows it too: its guesses are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import redraw

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "eos_token_id": None, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1}
QWEN = {
    "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
Family = Literal["glm", "qwen"]


def random_model(family: Family, folder: Path, **more: object) -> PreTrainedModel:
    """A model whose every weight is drawn, and its layer."""
    model = _model(family, 1, more)
    return _saved(family, model, folder, lambda name, tensor: tensor)


def as_transformers_loads(folder: Path) -> PreTrainedModel:
    """The GLM model with transformers' own way to use its layer: 5.23 looks for it behind layer 46 or 92 alone."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\."]
    return model


def chain_model(family: Family, folder: Path, share: float = 0.05, **more: object) -> PreTrainedModel:
    """What layers add is scaled by `share`: with 0 the next token follows from the last alone, as the layer says."""
    model = _model(family, 2, more)
    hidden = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.fill_(0.0 if family == "qwen" and "linear_attn" not in name else 1.0)
            if any(end in name for end in ("o_proj", "out_proj", "down_proj")):
                parameter.mul_(share)

    def guessing(name: str, tensor: Tensor) -> Tensor:
        if "eh_proj" in name or name == "mtp.fc.weight":
            return torch.cat([torch.eye(hidden), share * tensor[:, hidden:]], 1)
        return tensor

    return _saved(family, model, folder, guessing)


def _model(family: Family, seed: int, more: dict[str, object]) -> PreTrainedModel:
    settings = SIZES | (GLM if family == "glm" else QWEN) | more
    make: Callable[..., PreTrainedConfig] = getattr(
        transformers, "Glm4MoeConfig" if family == "glm" else "Qwen3NextConfig"
    )
    config = make(**settings)
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, seed)
    return model.eval()


def _saved(family: Family, model: PreTrainedModel, folder: Path, change: object) -> PreTrainedModel:
    """The model as transformers saves it, and the layer beside it: drawn as the last one of the model is."""
    assert callable(change)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    last = f"model.layers.{layers - 1}."
    start = f"model.layers.{layers}." if family == "glm" else "mtp.layers.0."
    generator = torch.Generator().manual_seed(7)

    def drawn(like: Tensor, spread: float = 0.1) -> Tensor:
        return like + spread * like.std().nan_to_num(1.0) * torch.randn(like.shape, generator=generator)

    own = {start + name.removeprefix(last): drawn(one) for name, one in tensors.items() if name.startswith(last)}
    around = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    if family == "qwen":
        around = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    outer = start if family == "glm" else "mtp."
    norm = tensors["model.norm.weight"]
    for name in around:
        square = name in ("eh_proj", "fc")
        own[f"{outer}{name}.weight"] = (
            torch.randn(hidden, 2 * hidden, generator=generator) / (2 * hidden) ** 0.5 if square else norm.clone()
        )
    if family == "glm":  # as shipped: the model's own, repeated
        own[f"{start}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        own[f"{start}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors |= {name: change(name, one).contiguous() for name, one in own.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model
