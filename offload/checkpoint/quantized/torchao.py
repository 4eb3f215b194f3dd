"""torchao's weights as transformers saves them: integers of 8 and 4 bits, MX floats, NVFP4. Imports no torch.

Of X.weight [O, I]: X._weight_qdata in I8, F8_E4M3 or F8_E5M2, X._weight_scale [O / h, I / w], a number for each block
of h x w, and for integers X._weight_zero_point in I8 of the same shape (torchao's Int8Tensor, Float8Tensor and
IntxUnpackedToInt8Tensor). Its Int4Tensor has two signed codes a byte, the lower half first, scales [G, O] and floats
of the same shape that are added; X._weight_act_pre_scale [I], if there, multiplies what a linear is given. Its MXTensor
has F8 codes, or U8 for two of 4 bits, and exponents [O, I / 32] in F8_E8M0; its NVFP4Tensor U8 codes, scales
[O, I / 16] in F8_E4M3 and perhaps X._weight_per_tensor_scale. These grids may lie in the order of NVIDIA's kernels:
tiles of 128 rows and 4 columns in 32 rows of 16, whose shape tells them apart.   O outputs   I inputs   G groups
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized import fp4
from offload.checkpoint.quantized.weight import FLOATS, Quantised, StoredFormat, damaged, member, settings_of
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "torchao"
CODES = {"I8": "torchao_int8", "F8_E4M3": "torchao_fp8", "F8_E5M2": "torchao_fp8_e5m2"}
# By the types of codes and scales: the scheme, codes a byte, and inputs that share a scale.
GROUPED = {
    ("F8_E4M3", "F8_E8M0"): ("torchao_mxfp8", 1, 32),
    ("F8_E5M2", "F8_E8M0"): ("torchao_mxfp8_e5m2", 1, 32),
    ("U8", "F8_E8M0"): ("torchao_mxfp4", 2, 32),
    ("U8", "F8_E4M3"): ("torchao_nvfp4", 2, 16),
}
READ = ("qdata", "scale", "zero_point")
# Only what these configs make is in Int4Tensor; shapes alone could mean another tensor with zero points in floats.
INT4_CONFIGS = re.compile(r'"(Int4WeightOnly|Float8DynamicActivationInt4Weight)Config"')
INT4, PRE_SCALE = "torchao_int4", "act_pre_scale"
INT4_GROUPS = (32, 64, 128, 256)
TILE_ROWS, TILE_COLUMNS = 128, 4
WHY = "transformers knows what torchao's tensors are from the headers of the original files alone"


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in a layout of torchao that is known; its other layouts are refused by name."""
    settings = settings_of(folder, (METHOD,))
    if settings is None:
        return
    held: dict[str, list[str]] = {}
    for name in folder.entries:
        prefix, marked, role = name.rpartition("._weight_")
        if marked:
            held.setdefault(prefix, []).append(role)
        elif name.endswith("_qdata"):
            raise UnsupportedModel(
                f"'{name}' is part of a weight in torchao's layout that is no linear's, which cannot be streamed.",
                "Streamed are linears and embeddings.",
                "a version of the model in another format, or the 16-bit one.",
            )
    in_int4 = INT4_CONFIGS.search(json.dumps(settings)) is not None
    for prefix, roles in held.items():
        yield _weight(folder, prefix, roles, in_int4)


def _weight(folder: Folder, prefix: str, roles: list[str], in_int4: bool) -> Quantised:
    name, entries = f"{prefix}.weight", folder.entries
    codes = member(entries, f"{prefix}._weight_qdata", name)
    if "scale_and_zero" in roles:
        raise _unknown(folder, prefix, roles)
    scales = member(entries, f"{prefix}._weight_scale", name)
    zeros = entries.get(f"{prefix}._weight_zero_point")
    if grouped := GROUPED.get((codes.dtype, scales.dtype)):
        return _grouped(folder, prefix, roles, *grouped)
    if in_int4 and codes.dtype == "I8" and zeros is not None and zeros.dtype in FLOATS:
        return _int4(folder, prefix, roles)
    strange = [role for role in roles if role not in READ]
    if strange or codes.dtype not in CODES or (zeros is not None and (codes.dtype != "I8" or zeros.dtype != "I8")):
        raise _unknown(folder, prefix, roles)
    fits = len(codes.shape) == len(scales.shape) == 2 and codes.nbytes > 0 and scales.nbytes > 0
    if not fits or codes.shape[0] % scales.shape[0] or codes.shape[1] % scales.shape[1] or scales.dtype not in FLOATS:
        raise damaged(name, f"'{scales.name}' is {scales.dtype} {list(scales.shape)} for {list(codes.shape)}")
    if zeros is not None and zeros.shape != scales.shape:
        raise damaged(name, f"'{zeros.name}' is {list(zeros.shape)}, its scales are {list(scales.shape)}")
    (O, I), (down, across) = codes.shape, scales.shape
    members = {"codes": codes, "scales": scales} | ({"zeros": zeros} if zeros else {})
    return Quantised(name, CODES[codes.dtype], (O, I), members, block=(O // down, I // across), bits=8)


def _int4(folder: Folder, prefix: str, roles: list[str]) -> Quantised:
    """A weight of two signed codes a byte, with scales and floats that are added."""
    name, entries = f"{prefix}.weight", folder.entries
    codes, scales, biases = (entries[f"{prefix}._weight_{role}"] for role in READ)
    factors = entries.get(f"{prefix}._weight_{PRE_SCALE}")
    if len(codes.shape) != 2 or {*roles} - {*READ, PRE_SCALE}:
        raise _unknown(folder, prefix, roles)
    O, I = codes.shape[0], 2 * codes.shape[1]
    G = scales.shape[0] if len(scales.shape) == 2 else 0
    whole = codes.nbytes and G and scales.shape == biases.shape == (G, O) and not I % G and I // G in INT4_GROUPS
    if not whole or scales.dtype not in FLOATS or scales.dtype != biases.dtype:
        shapes = " and ".join(f"'{one.name}' {one.dtype} {list(one.shape)}" for one in (scales, biases))
        raise damaged(name, f"{shapes} do not fit {O} x {I}")
    if factors is not None and (factors.dtype not in FLOATS or math.prod(factors.shape) != I):
        raise damaged(name, f"'{factors.name}' is {factors.dtype} {list(factors.shape)} for {I} inputs")
    members = {"codes": codes, "scales": scales, "biases": biases} | ({"factors": factors} if factors else {})
    return Quantised(name, INT4, (O, I), members, block=(1, I // G), bits=4)


def _grouped(folder: Folder, prefix: str, roles: list[str], scheme: str, a_byte: int, group: int) -> Quantised:
    """A weight of small floats whose scales are small floats too."""
    name, entries = f"{prefix}.weight", folder.entries
    codes, scales = (entries[f"{prefix}._weight_{role}"] for role in ("qdata", "scale"))
    if {*roles} - {"qdata", "scale", *(("per_tensor_scale",) if scheme == "torchao_nvfp4" else ())}:
        raise _unknown(folder, prefix, roles)
    if len(codes.shape) != 2 or not codes.nbytes:
        raise _unknown(folder, prefix, roles)
    O, I = codes.shape[0], codes.shape[1] * a_byte
    if I % group or scales.shape not in ((O, I // group), _tiled(O, I // group)):
        raise damaged(name, f"'{scales.name}' is {list(scales.shape)} for {O} x {I} in groups of {group}")
    members = {"codes": codes, "scales": scales}
    if whole := entries.get(f"{prefix}._weight_per_tensor_scale"):
        if whole.dtype != "F32" or math.prod(whole.shape) != 1:
            raise damaged(name, f"'{whole.name}' is {whole.dtype} {list(whole.shape)}")
        members["factor"] = whole
    return Quantised(name, scheme, (O, I), members, block=(1, group), bits=8 // a_byte)


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """The shape of a grid that lies in tiles, each of which has a line for every fourth of its rows."""
    across = -(-columns // TILE_COLUMNS)
    return -(-rows // TILE_ROWS) * (TILE_ROWS // 4), across * 4 * TILE_COLUMNS


def _unknown(folder: Folder, prefix: str, roles: list[str]) -> UnsupportedModel:
    entries = [(role, folder.entries[f"{prefix}._weight_{role}"]) for role in roles]
    found = ", ".join(f"{role} {one.dtype} {list(one.shape)}" for role, one in entries)
    return UnsupportedModel(
        f"'{prefix}.weight' is in a layout of torchao that cannot be streamed ({found}).",
        "Streamed are matrices in its Int4Tensor (int4_packing_format 'plain'), Int8Tensor, IntxUnpackedToInt8Tensor, "
        "Float8Tensor, MXTensor and NVFP4Tensor.",
        "a version of the model in one of these, or the 16-bit one.",
    )


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale in float32; of Int4Tensor code * scale + bias, times the factors of its inputs."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks, fill_rows
    from offload.checkpoint.quantized.arithmetic.small_floats import numbers

    codes = members["codes"]
    if weight.scheme == INT4:
        width, factors = weight.block[1], members.get("factors")
        scales_OG1, biases_OG1 = (members[role].t()[..., None] for role in ("scales", "biases"))

        def values(rows: slice) -> Tensor:
            low, high = codes[rows] << 4 >> 4, codes[rows] >> 4
            grouped = torch.stack([low, high], -1).float().view(len(low), -1, width)
            wide = grouped.mul_(scales_OG1[rows]).add_(biases_OG1[rows]).flatten(1)
            return wide if factors is None else wide.mul_(factors.view(-1))

        fill_rows(target, values)
        return
    if weight.scheme not in CODES.values():
        grid = _in_rows(numbers(members["scales"]), weight.shape[0], weight.shape[1] // weight.block[1])
        if weight.bits == 4:
            fp4.dequantise(weight, {**members, "scales": grid}, target)
        else:
            fill_blocks(target, lambda rows: codes[rows].float(), grid, weight.block)
        return
    fill_blocks(target, lambda rows: codes[rows].float(), members["scales"], weight.block, members.get("zeros"))


def _in_rows(grid: Tensor, rows: int, columns: int) -> Tensor:
    """A grid of scales row by row, [rows, columns], however it lies."""
    if grid.shape == (rows, columns):
        return grid
    down, across = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    tiles = grid.reshape(down, across, TILE_ROWS // 4, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * TILE_ROWS, across * TILE_COLUMNS)[:rows, :columns]


SPEEDS = dict.fromkeys((*CODES.values(), "torchao_mxfp8", "torchao_mxfp8_e5m2"), "int8")
SPEEDS |= dict.fromkeys((INT4, "torchao_mxfp4", "torchao_nvfp4"), "nf4")
FORMAT = StoredFormat("torchao in 8 and 4 bits, MX and NVFP4", (METHOD,), find, dequantise, SPEEDS, WHY)
