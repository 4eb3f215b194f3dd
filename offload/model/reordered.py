"""Linears whose weights lie as a CPU's 16-bit kernels want them, of a model that stays in memory and needs no others.

torch's own linear lays plain weights out anew for every product, which takes as long as the product where rows are few.
Results have the same bits, but for another division among threads.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from offload.stream.open import Keep

ROWS = 16  # that a layout is chosen for; others may come


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are such kernels: oneDNN's, on a CPU with bf16 arithmetic."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


class Reordered(nn.Linear):
    """A linear whose weight was laid out anew."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Products [..., O] of rows [..., I]."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return found


def reordering(layers: Iterable[nn.Module]) -> Keep:
    """Let the plain linears of layers that have no weights yet expect reordered ones; makes what they expect."""
    names = []
    for layer in layers:
        linears = {path: module for path, module in layer.named_modules() if type(module) is nn.Linear}
        for linear in linears.values():
            linear.__class__ = Reordered
        names.append({f"{path}.weight" for path in linears})

    def keep(layer: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        reorder, expected = torch.ops.mkldnn._reorder_linear_weight, names[layer]
        # The others are copied, so that the memory in which all were read can go.
        return {name: reorder(one, ROWS) if name in expected else one.clone() for name, one in tensors.items()}

    return keep
