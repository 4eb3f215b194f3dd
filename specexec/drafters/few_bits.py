"""Layers that draft in two to four bits a weight, quantised on the device where they compute. Knows no file.

nf4: blocks of 64 with a float32 scale (QLoRA, Dettmers et al. 2023) by bitsandbytes, 4.5 bits a weight.
hqq4, hqq3, hqq2: groups of 64 with a scale and a zero in 16 bits (HQQ, Badri and Shaji 2023) by hqq: 4.5, 3.7 (ten
codes in 32 bits) and 2.5 bits a weight.
R rows   I inputs   O outputs
"""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specexec.errors import UnsupportedArchitecture

Form = Literal["nf4", "hqq4", "hqq3", "hqq2"]
Part = tuple[Tensor, dict[str, Any]]  # codes, and what hqq must know of them
BLOCK = 64
# Weights that are dense at a time. On a CPU less than 1 MiB of float32: more would come from the system and go back to
# it with every operation while models are loaded (offload.machine.heap). A GPU takes longer to start an operation.
PART, PART_ON_CPU = 1 << 24, 3 << 16


def quantised(layer: nn.Module, device: torch.device, form: Form = "nf4") -> nn.Module:
    """The same layer, its linears in few bits on `device`. Changes `layer`; its full weights are let go."""
    filters = {f"{path}.weight" for path, module in layer.named_modules() if isinstance(module, nn.Conv1d)}
    wide = [name for name, one in layer.named_parameters() if one.dim() > 2 and name not in filters]
    if wide:
        raise UnsupportedArchitecture(
            f"fused experts cannot be quantised for drafting ({wide[0]}).",
            why="what quantises knows linears only; mixture-of-experts layers keep theirs in one block.",
            hint="--drafter sibling, skip or ngram.",
        )
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            small = FourBit(module, device) if form == "nf4" else Grouped(module, device, int(form[-1]))
            layer.get_submodule(parent)._modules[name] = small
    return layer.to(device)


class FourBit(nn.Module):
    """A linear whose weight is kept in NF4 and multiplied in the dtype of its input."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._kernels = _bitsandbytes()
        weight_OI = linear.weight.detach().to(device).contiguous()
        # bitsandbytes 0.50 reads wrong scales on the CPU where rows are no whole blocks: those go in as one long row.
        self._whole_blocks = linear.in_features % BLOCK == 0
        self._packed, self._state = self._kernels.functional.quantize_4bit(
            weight_OI if self._whole_blocks else weight_OI.flatten(), blocksize=BLOCK, quant_type="nf4"
        )
        self.bias = None if linear.bias is None else linear.bias.detach().to(device)

    @property
    def weight(self) -> Tensor:
        """The dense weight, [O, I]."""
        weight_OI: Tensor = self._kernels.functional.dequantize_4bit(self._packed, self._state)
        return weight_OI.view(self.out_features, self.in_features)

    def forward(self, rows_RI: Tensor) -> Tensor:
        # The fused kernel of the CPU is made for bf16; float32 is ten times slower there.
        if not self._whole_blocks or (rows_RI.device.type == "cpu" and rows_RI.dtype != torch.bfloat16):
            return nn.functional.linear(rows_RI, self.weight, self.bias)
        rows_RO: Tensor = self._kernels.matmul_4bit(rows_RI, self._packed.t(), self._state, bias=self.bias)
        return rows_RO


class Grouped(nn.Module):
    """A linear whose weight is kept in codes of so many bits and multiplied in its own dtype, some rows at a time."""

    def __init__(self, linear: nn.Linear, device: torch.device, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._padding = (0, -linear.in_features % BLOCK)  # groups end with their row
        self._quantizer = _hqq().Quantizer
        part = PART_ON_CPU if device.type == "cpu" else PART
        self._parts = [
            self._packed(part_PI.to(device), bits)
            for part_PI in linear.weight.detach().split(max(1, part // linear.in_features))
        ]
        self.bias = None if linear.bias is None else linear.bias.detach().to(device)

    @property
    def weight(self) -> Tensor:
        """The dense weight, [O, I]."""
        return torch.cat([self._dense(part) for part in self._parts])[:, : self.in_features]

    def forward(self, rows_RI: Tensor) -> Tensor:
        rows_RI = nn.functional.pad(rows_RI, self._padding)
        rows_RO = torch.cat([nn.functional.linear(rows_RI, self._dense(part)) for part in self._parts], dim=-1)
        return rows_RO if self.bias is None else rows_RO + self.bias

    def _packed(self, part_PI: Tensor, bits: int) -> Part:
        padded_PI = nn.functional.pad(part_PI, self._padding)
        codes, meta = self._quantizer.quantize(padded_PI, bits, group_size=BLOCK, axis=1, device=str(padded_PI.device))
        kept = torch.float16 if part_PI.dtype == torch.float32 else part_PI.dtype
        meta |= {name: meta[name].to(kept) for name in ("scale", "zero")} | {"compute_dtype": part_PI.dtype}
        return codes, meta

    def _dense(self, part: Part) -> Tensor:
        """Their dense weights, [P, I]."""
        dense_PI: Tensor = self._quantizer.dequantize(*part)
        return dense_PI


def _bitsandbytes() -> ModuleType:
    """Imported late, and without its remarks about packages that a CPU can do without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes


def _hqq() -> ModuleType:
    """An extra: `pip install specexec[hqq]`."""
    from hqq.core import quantize

    return quantize
