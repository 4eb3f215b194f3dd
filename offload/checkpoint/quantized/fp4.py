"""Floats of 4 bits, two a byte: NVFP4 and MXFP4 as compressed-tensors and ModelOpt write them. Imports no torch.

NVFP4: a scale in F8_E4M3 for each 16 inputs, and one number for all of them, which compressed-tensors divides by
(X.weight_packed, X.weight_scale, X.weight_global_scale) and ModelOpt multiplies with (X.weight in U8, X.weight_scale,
X.weight_scale_2). MXFP4: X.weight_packed or X.weight, and exponents in X.weight_scale for each 32 inputs.
O outputs   I inputs
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, beside, damaged, member, settings_of
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("compressed-tensors", "modelopt")
# ModelOpt's, those in fp8.py too. Others multiply what comes in with scales of their own (pre_quant_scale).
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
GROUPS = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}
UNREAD = ("input_scale", "input_global_scale", "input_amax")


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in bytes of two floats."""
    settings = settings_of(folder, METHODS)
    if settings is None:
        return
    algorithm = settings.get("quant_algo")
    if settings["quant_method"] == "modelopt" and algorithm not in (None, *ALGORITHMS):
        raise UnsupportedModel(
            f"{folder.path} is quantised with modelopt ({algorithm}), which cannot be streamed.",
            f"It is quant_algo that says so. Streamed are {', '.join(ALGORITHMS)}.",
            "a version of the model in one of these, or the 16-bit one.",
        )
    entries = folder.entries
    for name, codes in entries.items():
        prefix, _, last = name.rpartition(".")
        if codes.dtype != "U8" or last not in ("weight", "weight_packed"):
            continue
        base = f"{prefix}.weight"
        scales = member(entries, f"{prefix}.weight_scale", base)
        *experts, half = codes.shape or (0,)
        shape, group = (*experts, 2 * half), GROUPS.get(scales.dtype, 0)
        if len(shape) not in (2, 3) or not math.prod(shape) or not group:
            raise damaged(base, f"'{name}' is {list(codes.shape)} and '{scales.name}' {scales.dtype}")
        if 2 * half % group or scales.shape != (*shape[:-1], 2 * half // group):
            raise damaged(base, f"'{scales.name}' {list(scales.shape)} does not fit {list(shape)}")
        members = {"codes": codes, "scales": scales, **beside(entries, prefix, UNREAD)}
        if group == 16:
            role, other = (
                ("divisor", "weight_global_scale") if last == "weight_packed" else ("factor", "weight_scale_2")
            )
            members[role] = whole = member(entries, f"{prefix}.{other}", base)
            if whole.dtype != "F32" or math.prod(whole.shape) not in (1, math.prod(shape[:-2])):
                raise damaged(base, f"'{whole.name}' is {whole.dtype} {list(whole.shape)}")
        yield Quantised(base, "nvfp4" if group == 16 else "mxfp4_rows", shape, members, block=(1, group), bits=4)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Codes by a table times the scale of their group, which is one number of 8 bits times one of 32."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import by_table, fill_stack
    from offload.checkpoint.quantized.arithmetic.small_floats import FP4, numbers

    O, I = weight.shape[-2:]
    codes_EOB = members["codes"].reshape(-1, O, I // 2)
    scales = numbers(members["scales"]).view(len(codes_EOB), O, -1)
    if "divisor" in members:
        scales = scales / members["divisor"].view(-1, 1, 1)
    if "factor" in members:
        scales = scales * members["factor"].view(-1, 1, 1)
    pairs = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)], device=target.device)
    fill_stack(target, codes_EOB, lambda codes: by_table(codes, pairs).flatten(1), scales, weight.block)


FORMAT = StoredFormat("NVFP4 and MXFP4", METHODS, find, dequantise, {"nvfp4": "nf4", "mxfp4_rows": "nf4"})
