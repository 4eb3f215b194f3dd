"""torchao's weights of 8 bits, as transformers saves them: integers of 1 to 8 bits a byte, or floats. Imports no torch.

Of X.weight [O, I]: X._weight_qdata in I8, F8_E4M3 or F8_E5M2, X._weight_scale [O / h, I / w], a number for each block
of h x w, and for integers X._weight_zero_point in I8 of the same shape. (torchao's Int8Tensor, Float8Tensor and
IntxUnpackedToInt8Tensor; its int4 has other types and shapes.)   O outputs   I inputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import FLOATS, Quantised, StoredFormat, damaged, member, settings_of
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "torchao"
CODES = {"I8": "torchao_int8", "F8_E4M3": "torchao_fp8", "F8_E5M2": "torchao_fp8_e5m2"}
READ = ("qdata", "scale", "zero_point")
WHY = "transformers knows what torchao's tensors are from the headers of the original files alone"


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in torchao's 8 bits; its other layouts are refused by name."""
    if settings_of(folder, (METHOD,)) is None:
        return
    held: dict[str, list[str]] = {}
    for name in folder.entries:
        prefix, marked, role = name.rpartition("._weight_")
        if marked:
            held.setdefault(prefix, []).append(role)
    for prefix, roles in held.items():
        yield _weight(folder, prefix, roles)


def _weight(folder: Folder, prefix: str, roles: list[str]) -> Quantised:
    name, entries = f"{prefix}.weight", folder.entries
    codes, scales = (member(entries, f"{prefix}._weight_{role}", name) for role in ("qdata", "scale"))
    zeros = entries.get(f"{prefix}._weight_zero_point")
    strange = [role for role in roles if role not in READ]
    if strange or codes.dtype not in CODES or (zeros is not None and (codes.dtype != "I8" or zeros.dtype != "I8")):
        found = ", ".join(f"{role} {one.dtype} {list(one.shape)}" for role in roles
                          for one in (entries[f"{prefix}._weight_{role}"],))  # fmt: skip
        raise UnsupportedModel(
            f"'{name}' is in a layout of torchao that cannot be streamed ({found}).",
            "Streamed are its Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor.",
            "a version of the model in one of these, or the 16-bit one.",
        )
    fits = len(codes.shape) == len(scales.shape) == 2 and codes.nbytes > 0 and scales.nbytes > 0
    if not fits or codes.shape[0] % scales.shape[0] or codes.shape[1] % scales.shape[1] or scales.dtype not in FLOATS:
        raise damaged(name, f"'{scales.name}' is {scales.dtype} {list(scales.shape)} for {list(codes.shape)}")
    if zeros is not None and zeros.shape != scales.shape:
        raise damaged(name, f"'{zeros.name}' is {list(zeros.shape)}, its scales are {list(scales.shape)}")
    (O, I), (down, across) = codes.shape, scales.shape
    members = {"codes": codes, "scales": scales} | ({"zeros": zeros} if zeros else {})
    return Quantised(name, CODES[codes.dtype], (O, I), members, block=(O // down, I // across), bits=8)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale in float32."""
    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks

    codes = members["codes"]
    fill_blocks(target, lambda rows: codes[rows].float(), members["scales"], weight.block, members.get("zeros"))


FORMAT = StoredFormat("torchao in 8 bits", (METHOD,), find, dequantise, dict.fromkeys(CODES.values(), "int8"), WHY)
