"""MXFP4 as gpt-oss has it: X_blocks and X_scales are a stack of experts. Imports no torch.

E experts   O outputs   I inputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, damaged

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32


def find(folder: Folder) -> Iterator[Quantised]:
    """Stacks of experts in MXFP4."""
    entries = folder.entries
    for name, codes in entries.items():
        base = name.removesuffix("_blocks")
        scales = entries.get(f"{base}_scales")
        if base == name or scales is None:
            continue
        if len(codes.shape) != 4 or codes.shape[:-1] != scales.shape or codes.dtype != "U8" or scales.dtype != "U8":
            shapes = " and ".join(f"'{one.name}' {one.dtype} {list(one.shape)}" for one in (codes, scales))
            raise damaged(base, f"{shapes} do not match")
        experts, rows, groups, packed = codes.shape
        if 2 * packed != BLOCK or not codes.nbytes:
            raise damaged(base, f"'{name}' {list(codes.shape)} is not of {BLOCK} values a block")
        # Stored output by output; the module keeps the transpose.
        yield Quantised(
            base, "mxfp4", (experts, groups * packed * 2, rows), {"codes": codes, "scales": scales}, dtype="BF16"
        )


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Codes [E, O, G groups, B bytes] of two values each, the low half first, into a target [E, I, O]."""
    import torch

    from offload.checkpoint.quantized.arithmetic.pieces import fill_each, runs
    from offload.checkpoint.quantized.arithmetic.small_floats import FP4

    codes, scales = members["codes"], members["scales"]
    wide = torch.float32 if target.dtype == torch.float16 else target.dtype  # which holds every power of two
    values = torch.tensor(FP4, dtype=wide, device=target.device)
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - 127).to(target.device, wide)
    E, O, G, B = codes.shape

    def fill(expert: int) -> None:
        # Turned round while it is small: then all that follows runs along memory.
        codes_GBO = codes[expert].view(O, G * B).t().contiguous().view(G, B, O)
        powers_GO = powers.index_select(0, scales[expert].t().reshape(-1).int()).view(G, 1, O)
        target_GBO2 = target[expert].view(G, B, 2, O).transpose(2, 3)
        for groups in runs(G, B * O * 4, target):
            for half, chosen in enumerate((codes_GBO[groups] & 15, codes_GBO[groups] >> 4)):
                dense = values.index_select(0, chosen.view(-1).int()).view(chosen.shape)
                target_GBO2[groups, ..., half].copy_(dense.mul_(powers_GO[groups]))

    fill_each(fill, range(E), target)


FORMAT = StoredFormat("MXFP4", ("mxfp4",), find, dequantise, {"mxfp4": "mxfp4"})
