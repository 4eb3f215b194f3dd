"""compressed-tensors' integers: packed in 1 to 8 bits (pack-quantized), or one a byte. Imports no torch.

pack-quantized: X.weight_packed [O, words], X.weight_scale [O, G], and perhaps X.weight_zero_point [words, G],
X.weight_shape. int-quantized: X.weight in I8 and X.weight_scale. Both may have X.weight_g_idx [I], the group of each
input. Its other formats are floats: fp8.py and fp4.py.   O outputs   I inputs   G groups
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.documents import Json
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_small
from offload.checkpoint.quantized.weight import (
    FLOATS,
    Quantised,
    StoredFormat,
    beside,
    damaged,
    member,
    order_of,
    settings_of,
)
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "compressed-tensors"
# What is read here and, as floats, in fp8.py and fp4.py.
KNOWN = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
UNREAD = ("weight_shape", "input_scale", "input_zero_point", "input_global_scale", "output_scale")


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in integers; kinds of compression that cannot be undone are refused by name."""
    settings = settings_of(folder, (METHOD,))
    if settings is None:
        return
    _refuse_others(folder, settings)
    kinds = _kinds(settings)
    for name, codes in folder.entries.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight_packed" and codes.dtype == "I32":
            yield _packed(folder, prefix, codes, kinds)
        elif last == "weight" and codes.dtype == "I8" and len(codes.shape) == 2:
            yield _whole(folder.entries, prefix, codes, kinds)


def _refuse_others(folder: Folder, settings: Mapping[str, Json]) -> None:
    sparsity = settings.get("sparsity_config")
    named = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    named.append(sparsity.get("format") if isinstance(sparsity, dict) else None)
    strange = [str(one) for one in named if one is not None and one not in KNOWN]
    transformed = settings.get("transform_config")
    if transformed:
        strange.append("transforms of what is multiplied (transform_config)")
    if strange:
        raise UnsupportedModel(
            f"{folder.path} is quantised with compressed-tensors, {strange[0]}, which cannot be streamed.",
            f"It is format in quantization_config that says so. Streamed are {', '.join(KNOWN[1:])}.",
            "a version of the model in one of these, or the 16-bit one.",
        )


def _groups(settings: Mapping[str, Json]) -> list[dict[str, Json]]:
    groups = settings.get("config_groups")
    return [one for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []


def _kinds(settings: Mapping[str, Json]) -> list[tuple[int, int, bool]]:
    """Bits of a code, inputs of a group (0: all), and whether there are zero points, of every kind of integers."""
    found = []
    for group in _groups(settings):
        weights = group.get("weights")
        if not isinstance(weights, dict):
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if type(bits) is int and 1 <= bits <= 8 and weights.get("type", "int") == "int":
            found.append((bits, size if type(size) is int and size > 0 else 0, weights.get("symmetric") is False))
    return found


def _packed(folder: Folder, prefix: str, codes: Entry, kinds: list[tuple[int, int, bool]]) -> Quantised:
    name, entries = f"{prefix}.weight", folder.entries
    scales = member(entries, f"{prefix}.weight_scale", name)
    if len(codes.shape) != 2 or len(scales.shape) != 2 or not codes.nbytes or scales.dtype not in FLOATS:
        raise damaged(name, f"'{codes.name}' {list(codes.shape)} and '{scales.name}' {list(scales.shape)} do not fit")
    (O, words), G = codes.shape, scales.shape[1]
    given = _told_shape(folder, f"{prefix}.weight_shape", name)
    fitting = []
    for bits, size, asymmetric in dict.fromkeys(kinds):
        I = size * G if size else given[1] if given else words * 32 // bits
        if words == -(-I * bits // 32) and (size or G == 1) and (given is None or (given[0], given[1]) == (O, I)):
            fitting.append((bits, I, size or I, asymmetric))
    if len(fitting) != 1 or scales.shape[0] != O:
        raise damaged(
            name,
            f"'{codes.name}' {list(codes.shape)} with '{scales.name}' {list(scales.shape)} fits "
            f"{len(fitting)} of the {len(kinds)} config_groups of config.json",
        )
    ((bits, I, size, asymmetric),) = fitting
    members = {"codes": codes, "scales": scales, **beside(entries, prefix, UNREAD)}
    if asymmetric:
        members["zeros"] = zeros = member(entries, f"{prefix}.weight_zero_point", name)
        if zeros.dtype != "I32" or zeros.shape != (-(-O * bits // 32), G):
            raise damaged(name, f"'{zeros.name}' is {zeros.dtype} {list(zeros.shape)}")
    members |= order_of(entries, f"{prefix}.weight_g_idx", name, I)
    return Quantised(name, f"ct_int{bits}", (O, I), members, block=(1, size), bits=bits)


def _told_shape(folder: Folder, name: str, base: str) -> tuple[int, int] | None:
    """What the file says of a weight's shape; of a file that is elsewhere nothing can be read."""
    entry = folder.entries.get(name)
    if entry is None or not folder.here:
        return None
    size = {"I64": 8, "I32": 4}.get(entry.dtype)
    if size is None or entry.nbytes != 2 * size:
        raise damaged(base, f"'{name}' is {entry.dtype} {list(entry.shape)}")
    text = read_small(entry)
    O, I = (int.from_bytes(text[start : start + size], "little", signed=True) for start in (0, size))
    return O, I


def _whole(entries: Mapping[str, Entry], prefix: str, codes: Entry, kinds: list[tuple[int, int, bool]]) -> Quantised:
    name = f"{prefix}.weight"
    scales, (O, I) = member(entries, f"{prefix}.weight_scale", name), codes.shape
    count = math.prod(scales.shape)
    sizes = [size for _, size, _ in kinds if size and scales.shape == (O, -(-I // size))]
    if scales.dtype not in FLOATS or not codes.nbytes or (count not in (1, O) and not sizes):
        raise damaged(name, f"'{scales.name}' is {scales.dtype} {list(scales.shape)}")
    block = (1, I) if count == O else (O, I) if count == 1 else (1, sizes[0])
    members = {"codes": codes, "scales": scales, **beside(entries, prefix, UNREAD)}
    if f"{prefix}.weight_zero_point" in entries:
        members["zeros"] = zeros = entries[f"{prefix}.weight_zero_point"]
        if zeros.dtype != "I8" or math.prod(zeros.shape) != count:
            raise damaged(name, f"'{zeros.name}' is {zeros.dtype} {list(zeros.shape)}")
    if sizes:
        members |= order_of(entries, f"{prefix}.weight_g_idx", name, I)
    return Quantised(name, "ct_int8_bytes", (O, I), members, block=block, bits=8)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale; packed codes without zero points count from the middle of their range."""
    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks, of_outputs, outputs_apart, unpacked

    (O, I), (height, width), bits = weight.shape, weight.block, weight.bits
    grid = (-(-O // height), -(-I // width))
    codes, scales, zeros = members["codes"], members["scales"].reshape(grid), members.get("zeros")
    if weight.scheme == "ct_int8_bytes":
        zeros = None if zeros is None else zeros.reshape(grid)
        fill_blocks(target, lambda rows: codes[rows].float(), scales, weight.block, zeros, members.get("order"))
        return
    middle = 0 if zeros is not None else 1 << (bits - 1)
    own, step = (None, 1) if zeros is None else (of_outputs(zeros.t(), bits), outputs_apart(bits))

    def values(rows: slice) -> Tensor:
        return unpacked(codes[rows], bits, I).float().sub_(middle)

    fill_blocks(target, values, scales, weight.block, own, members.get("order"), step)


SPEEDS = {f"ct_int{bits}": "nf4" if bits < 8 else "int8" for bits in range(1, 9)}
FORMAT = StoredFormat("compressed-tensors", (METHOD,), find, dequantise, {**SPEEDS, "ct_int8_bytes": "int8"})
