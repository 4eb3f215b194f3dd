"""int8 with one scale a row: X.weight and X.SCB as bitsandbytes writes them, X and X.SCB for stacks. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder, read_small
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, check_sizes, damaged, member
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def find(folder: Folder) -> Iterator[Quantised]:
    """Weights in 8 bits with one scale a row."""
    entries = folder.entries
    for name, scales in entries.items():
        prefix, dot, role = name.rpartition(".")
        if not dot or role != "SCB":
            continue
        base = prefix if prefix in entries else f"{prefix}.weight"
        codes = member(entries, base, name)
        members = {"codes": codes, "scales": scales}
        if f"{prefix}.weight_format" in entries:
            members["other"] = entries[f"{prefix}.weight_format"]
            if folder.here and members["other"].nbytes == 1 and read_small(members["other"]) != b"\0":
                raise UnsupportedModel(
                    f"'{base}' is stored in a tiled order of some GPU, which cannot be streamed.",
                    hint="a version of the model that was saved with a recent bitsandbytes.",
                )
        weight = Quantised(base, "int8", codes.shape, members)
        if codes.dtype != "I8" or scales.dtype != "F32":
            raise damaged(base, f"its codes are {codes.dtype} and its scales {scales.dtype}")
        if len(codes.shape) not in (2, 3) or not codes.nbytes:
            raise damaged(base, f"its codes have the shape {list(codes.shape)}")
        check_sizes(weight, {"scales": math.prod(codes.shape[:-1]) * 4})
        yield weight


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Codes times the scale of their row."""
    from offload.checkpoint.quantized.arithmetic.row_codes import fill_integers

    codes = members["codes"]
    fill_integers(list(codes.view(-1, *codes.shape[-2:])), members["scales"], target)


def as_stored(members: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A weight that computes in integers."""
    from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes

    return RowCodes.of(members["codes"], members["scales"], dtype)


FORMAT = StoredFormat("bitsandbytes 8 bit", ("bitsandbytes",), find, dequantise, {"int8": "int8"}, as_stored=as_stored)
