"""Small LoRA adapters in peft's layout, made for a test."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from offload.checkpoint.documents import Json
from offload.checkpoint.lora import PREFIX, WEIGHTS

Halves = tuple[torch.Tensor, torch.Tensor]


def adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    r: int = 4,
    more: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Json] | None = None,
) -> dict[str, Halves]:
    """An adapter on modules of these shapes, outputs by inputs; returns B [O, r] and A [r, I] of each."""
    path.mkdir(exist_ok=True)
    chance = torch.Generator().manual_seed(len(path.name))
    made = {
        name: (torch.randn(O, r, generator=chance) / 4, torch.randn(r, I, generator=chance) / 4)
        for name, (O, I) in shapes.items()
    }
    tensors = {f"{PREFIX}{name}.lora_B.weight": b for name, (b, _) in made.items()}
    tensors |= {f"{PREFIX}{name}.lora_A.weight": a for name, (_, a) in made.items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in (more or {}).items()}
    save_file(tensors, path / WEIGHTS)
    settings: dict[str, Json] = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (path / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
    return made
