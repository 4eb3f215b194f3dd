"""Record what peft makes of small adapters: tests/recorded/adapters/*, an adapter and weights before and after.

In each folder: the adapter as peft saves it, and weights.safetensors with `before/NAME` and `after/NAME`, which is what
peft's `merge_and_unload` leaves. Tests need no peft.

pip install peft==0.21.2
python scripts/record_adapters.py
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

OUT = Path(__file__).parent.parent / "tests" / "recorded" / "adapters"
O, I = 40, 96
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {"r": 8, "lora_alpha": 12}),
    "bf16": (torch.bfloat16, {"r": 8, "lora_alpha": 12}),
    "patterns": (
        torch.float32,
        {
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3, r"layers\.1\.q_proj": 5},
            "alpha_pattern": {"1.q_proj": 7, "q_proj": 20},
        },
    ),
}


def base(dtype: torch.dtype) -> nn.Module:
    """Two layers of two linears."""
    torch.manual_seed(0)
    layers = [
        nn.ModuleDict({name: nn.Linear(I, O, bias=False, dtype=dtype) for name in ("q_proj", "k_proj")}) for _ in "12"
    ]
    return nn.Sequential(OrderedDict(layers=nn.ModuleList(layers)))


def main() -> None:
    """Record every case."""
    for name, (dtype, settings) in CASES.items():
        folder = OUT / name
        before = {f"before/{key}": tensor.clone() for key, tensor in base(dtype).state_dict().items()}
        adapted = get_peft_model(base(dtype), LoraConfig(target_modules=["q_proj", "k_proj"], **settings))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape) / 4)
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        merged = PeftModel.from_pretrained(base(dtype), folder).merge_and_unload()
        after = {f"after/{key}": tensor.clone() for key, tensor in merged.state_dict().items()}
        save_file(before | after, folder / "weights.safetensors")
        print(name, list(after))


if __name__ == "__main__":
    main()
