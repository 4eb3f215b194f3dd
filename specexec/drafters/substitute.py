"""The target drafts for itself with a 4-bit copy of its layers (SubSpec, Wang et al. 2025). Knows no file.

For targets that stream at higher precision: the copy stays on the device, embeddings, norms and head are shared, keys
and values are its own. NF4 in blocks of 64 (QLoRA, Dettmers et al. 2023) by bitsandbytes: 4.5 bits a weight.
R rows   I inputs   O outputs
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from specexec.drafters.cascade import Cascade
from specexec.drafters.sibling import SiblingDrafter
from specexec.errors import UnsupportedArchitecture
from specexec.lm import TreeLM
from specexec.partial import rebuilt
from specexec.ranking import Ranking

BLOCK = 64


def substituting(
    target: TreeLM,
    layers: Mapping[int, nn.Module],
    vocabulary: int,
    ranking: Ranking | None = None,
    cascade: Cascade | None = None,
) -> SiblingDrafter:
    """A drafter over layers of the target that went through `quantised`."""
    lm = target.alike(rebuilt(target.model, layers))
    return SiblingDrafter(lm, vocabulary, ranking, name="substitute", cascade=cascade)


def quantised(layer: nn.Module, device: torch.device) -> nn.Module:
    """The same layer, its linears in NF4 on `device`. Changes `layer`; its full weights are let go."""
    wide = [name for name, parameter in layer.named_parameters() if parameter.dim() > 2]
    if wide:
        raise UnsupportedArchitecture(
            f"fused experts cannot be quantised for drafting ({wide[0]}).",
            why="bitsandbytes knows linears only; mixture-of-experts layers keep theirs in one block.",
            hint="--drafter sibling, skip or ngram.",
        )
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            layer.get_submodule(parent)._modules[name] = FourBit(module, device)
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
        """What the four bits stand for, [O, I]."""
        weight_OI: Tensor = self._kernels.functional.dequantize_4bit(self._packed, self._state)
        return weight_OI.view(self.out_features, self.in_features)

    def forward(self, rows_RI: Tensor) -> Tensor:
        # The fused kernel of the CPU is made for bf16; float32 is ten times slower there.
        if not self._whole_blocks or (rows_RI.device.type == "cpu" and rows_RI.dtype != torch.bfloat16):
            return nn.functional.linear(rows_RI, self.weight, self.bias)
        rows_RO: Tensor = self._kernels.matmul_4bit(rows_RI, self._packed.t(), self._state, bias=self.bias)
        return rows_RO


def _bitsandbytes() -> ModuleType:
    """Imported late, and without its remarks about packages that a CPU can do without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes
