"""A target whose next token follows from its last alone, and EAGLE heads that know it, saved as publishers do.

The head's attention finds its own token and hands on that token's embedding, as the target does. Eight of the hidden
numbers are silent: the target's third layer is the first to write into them, and what an EAGLE-3 head reads there is
noise to it. So it is right where it reads x_0, x_1, x_2, and wrong one layer later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from offload.hub.names import demo_folder
from tests.tiny import redraw

VOCABULARY, HIDDEN, LAYERS, SILENT = 96, 32, 4, 8
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "rope_theta": 10000.0,
}  # fmt: skip
OWN = SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HIDDEN, "num_hidden_layers": 1}
RECORDED = Path(__file__).parent / "data" / "heads"
SHARP = 3.0  # queries and keys: a row sees its own token


def recorded(name: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """config.json and tensors of a head whose outputs were recorded."""
    folder = RECORDED / name
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors")


def chain_target(folder: Path, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Layers add nothing but to the silent numbers, a little, from the third on."""
    make: Callable[..., PreTrainedConfig] = transformers.LlamaConfig
    config = make(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=LAYERS,
        vocab_size=vocabulary, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, 2)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.dim() == 1:
                one.fill_(1.0)
            if any(end in name for end in ("o_proj", "down_proj")):
                one[: HIDDEN - SILENT] = 0.0
                one.mul_(0.01 if name == "model.layers.2.mlp.down_proj.weight" else 0.0)
            if "embed" in name:
                one[:, -SILENT:] = 0.0
    model.eval().save_pretrained(folder)
    return model


def demo_chain_target(folder: Path) -> PreTrainedModel:
    """The same of the demo's tokens, with its tokenizer."""
    model = chain_target(folder, 4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, folder / file)
    return model


def knowing_head(model: PreTrainedModel, share: float = 0.0, kept: list[int] | None = None) -> dict[str, Tensor]:
    """EAGLE-3 as `speculators` names it, for all tokens or those that are `kept`; `share` of every weight is drawn."""
    drawn = torch.Generator().manual_seed(11)

    def near(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=drawn) / (weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1.0)
        return weight + share * noise

    same, none = torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    silent = torch.zeros(HIDDEN)
    silent[-SILENT:] = 1.0
    head, table = model.lm_head.weight.detach(), model.model.embed_tokens.weight.detach()
    assert isinstance(head, Tensor)
    assert isinstance(table, Tensor)
    vocabulary = len(head)
    ids = torch.tensor([*range(vocabulary)] if kept is None else kept)
    rows = head[ids].clone()
    rows[:, -SILENT:] = 3 * torch.randn(len(ids), SILENT, generator=drawn)
    joined = torch.diag(silent).repeat(1, 3)
    tensors = {
        "embed_tokens.weight": table.clone(),
        "fc.weight": torch.where(silent[:, None] > 0, joined, near(joined)),  # the norm behind it enlarges
        "layers.0.input_layernorm.weight": torch.ones(HIDDEN),
        "layers.0.hidden_norm.weight": near(3 * silent),
        "layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN),
        "layers.0.self_attn.q_proj.weight": near(SHARP * torch.cat([same, none], 1)),
        "layers.0.self_attn.k_proj.weight": near(SHARP * torch.cat([same, none], 1)),
        "layers.0.self_attn.v_proj.weight": near(torch.cat([same, none], 1)),
        "layers.0.self_attn.o_proj.weight": near(same),
        "layers.0.mlp.gate_proj.weight": near(torch.zeros(48, HIDDEN)),
        "layers.0.mlp.up_proj.weight": near(torch.zeros(48, HIDDEN)),
        "layers.0.mlp.down_proj.weight": near(torch.zeros(HIDDEN, 48)),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": rows,
        "verifier_norm.weight": torch.ones(HIDDEN),
    }
    if kept is not None:
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": torch.isin(torch.arange(vocabulary), ids)}
    return tensors


def settings_of(ids: list[int] | None, vocabulary: int = VOCABULARY) -> dict[str, object]:
    """config.json as `speculators` writes it."""
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/model", "architectures": []}},
        "transformer_layer_config": OWN | {"model_type": "llama", "vocab_size": vocabulary},
        "eagle_aux_hidden_state_layer_ids": ids,
        "norm_before_residual": True,
    }


def saved(settings: dict[str, object], tensors: dict[str, Tensor], folder: Path) -> Path:
    """A folder as it comes from the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    return folder
