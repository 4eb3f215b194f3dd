"""Floats of 8 bits, with one scale for each block, row or tensor. Imports no torch.

A weight X.weight in F8_E4M3 or F8_E5M2 has its scale beside it: X.weight_scale_inv (DeepSeek, Qwen, GLM, MiniMax),
X.weight_scale (compressed-tensors' float-quantized, fbgemm, ModelOpt), X.qscale_weight (Mistral). All of them multiply.
X.weight_g_idx [I] (older compressed-tensors) says which group each input is in.
Experts that lie in one tensor X have X_scale_inv or X_scale. Scales of what is multiplied with a weight stay unread:
only weights are in few bits here.   E experts   O outputs   I inputs
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, damaged, order_of, settings_of

if TYPE_CHECKING:
    from torch import Tensor

CODES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # U8: exponents, as F8_E8M0
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")


def find(folder: Folder) -> Iterator[Quantised]:
    """Each tensor of 8-bit floats that has a scale."""
    settings = settings_of(folder, METHODS)
    if settings is None:
        return
    blocks = list(_blocks(settings))
    for name, codes in folder.entries.items():
        prefix, _, last = name.rpartition(".")
        if codes.dtype not in CODES or len(codes.shape) not in (2, 3) or "scale" in last:
            continue
        names = [f"{name}_scale_inv", f"{name}_scale", f"{prefix}.qscale_{last}", f"{prefix}.scale"]
        scales = next((folder.entries[one] for one in names if one in folder.entries), None)
        if scales is None:
            raise damaged(name, f"it has no scale: none of {', '.join(names)} is there")
        unread = [f"{prefix}.{one}" for one in ("activation_scale", "input_scale", "qscale_act", "input_scale_ub")]
        unread += [f"{name}_activation_scale", f"{name}_input_scale"]
        beside = {one: folder.entries[one] for one in unread if one in folder.entries}
        order = order_of(folder.entries, f"{name}_g_idx", name, codes.shape[-1]) if len(codes.shape) == 2 else {}
        members = {"codes": codes, "scales": scales, **beside, **order}
        block = _block(name, codes, scales, blocks)
        yield Quantised(name, CODES[codes.dtype], codes.shape, members, block=block)


def _blocks(settings: Mapping[str, object]) -> Iterator[tuple[int, int]]:
    """The blocks that the settings name, outputs by inputs."""
    groups = settings.get("config_groups")
    named = [settings.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        named.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for sizes in (*named, [128, 128]):
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
            yield sizes[0], sizes[1]


def _block(name: str, codes: Entry, scales: Entry, blocks: list[tuple[int, int]]) -> tuple[int, int]:
    """Which values share a scale, as its shape says."""
    if not math.prod(codes.shape):
        raise damaged(name, f"it is empty, {list(codes.shape)}")
    if scales.dtype not in SCALES:
        raise damaged(name, f"its scale '{scales.name}' is {scales.dtype}")
    *experts, O, I = codes.shape
    count = math.prod(scales.shape)
    matrices = math.prod(experts)
    if count in (1, matrices):
        return O, I
    if len(scales.shape) == len(codes.shape) and scales.shape[-2:] == (1, I):
        return O, 1
    if count == matrices * O:
        return 1, I
    for height, width in blocks:
        grid = (*experts, -(-O // height), -(-I // width))
        if [size for size in scales.shape if size > 1] == [size for size in grid if size > 1] and count:
            return height, width
    if len(scales.shape) == len(codes.shape) and count and not (O % scales.shape[-2] or I % scales.shape[-1]):
        return O // scales.shape[-2], I // scales.shape[-1]
    raise damaged(name, f"the scale '{scales.name}' {list(scales.shape)} does not fit {list(codes.shape)}")


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Codes times the scale of their block, in float32."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import by_table, fill_stack
    from offload.checkpoint.quantized.arithmetic.small_floats import numbers

    (O, I), (height, width) = weight.shape[-2:], weight.block
    codes_EOI = members["codes"].view(torch.uint8).reshape(-1, O, I)
    scales = numbers(members["scales"]).reshape(-1, -(-O // height), -(-I // width))
    table = numbers(torch.arange(256, dtype=torch.uint8).view(members["codes"].dtype)).to(target.device)
    fill_stack(target, codes_EOI, lambda codes: by_table(codes, table), scales, weight.block, members.get("order"))


FORMAT = StoredFormat("fp8", METHODS, find, dequantise, {"fp8": "int8", "fp8_e5m2": "int8"})
