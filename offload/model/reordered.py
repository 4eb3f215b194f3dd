"""Linears whose weights lie as a CPU's 16-bit kernels want them, of a model that stays in memory and needs no others.

torch's own linear lays plain weights out anew for every product, which takes as long as the product where rows are few.
Results have the same bits, but for another division among threads. Linears that read the same rows are one product.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from offload.stream.open import Keep

ROWS = 16  # that a layout is chosen for; others may come
# Linears of one module that read the same rows, as transformers' layers call them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


class Joined(nn.Linear):
    """One of several linears without bias that read the same rows: each has the weights of all, and takes its outputs.

    Their product is kept with the rows, until these change.
    """

    outputs: slice

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Products [..., O] of rows [..., I]."""
        found = getattr(input, "_joined", None)
        version = None if input.is_inference() else input._version  # None: nothing tells whether it has changed
        if found is None or found.weight is not self.weight or version is None or found.version != version:
            product = torch.ops.mkldnn._linear_pointwise(input, self.weight, None, "none", [], "")
            found = _Product(product, self.weight, version)
            input._joined = found  # type: ignore[attr-defined]  # tensors take any attribute
        part: torch.Tensor = found.outputs[..., self.outputs]
        return part


@dataclass(frozen=True)
class _Product:
    outputs: torch.Tensor
    weight: torch.Tensor
    version: int | None


def reordering(layers: Iterable[nn.Module]) -> Keep:
    """Let the plain linears of layers that have no weights yet expect reordered ones; makes what they expect."""
    groups = [_groups(layer) for layer in layers]

    def keep(layer: int, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        for names in groups[layer]:
            whole = torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
            kept |= dict.fromkeys(names, torch.ops.mkldnn._reorder_linear_weight(whole, ROWS))
        # The others are copied, so that the memory in which all were read can go.
        return {name: kept[name] if name in kept else one.clone() for name, one in tensors.items()}

    return keep


def _groups(layer: nn.Module) -> list[list[str]]:
    """The names of the weights of plain linears, those of one product together; turns these linears."""
    plain = {path: module for path, module in layer.named_modules() if type(module) is nn.Linear}
    groups: list[list[str]] = []
    for path, _ in layer.named_modules():
        for names in TOGETHER:
            paths = [f"{path}.{name}" if path else name for name in names]
            members = [plain[one] for one in paths if one in plain]
            if len(members) < len(names) or any(one.bias is not None for one in members):
                continue
            if len({one.in_features for one in members}) > 1:
                continue
            start = 0
            for one, member in zip(paths, members, strict=True):
                member.__class__ = Joined
                assert isinstance(member, Joined)
                member.outputs = slice(start, start := start + member.out_features)
                del plain[one]
            groups.append([f"{one}.weight" for one in paths])
    for linear in plain.values():
        linear.__class__ = Reordered
    return [*groups, *([f"{path}.weight"] for path in plain)]
