"""int4, a format of ours: 8-bit integers in 4.5 bits, in groups of 32 inputs, with one scale a row. Imports no torch.

X.weight are the codes, with X.int4_scales, X.int4_steps and X.int4_origins; of stacks X, X.int4_scales and so on.
A row's integers times its scale, the largest magnitude of the row, over 127 are its weights, as in int8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, damaged, member

if TYPE_CHECKING:
    import torch

    from offload.checkpoint.quantized.arithmetic.group_codes import GroupCodes
    from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes

GROUP = 32
ROLES = ("scales", "steps", "origins")
WHY = "no other program reads int4 weights of specexec"
DTYPES = {"codes": "U8", "scales": "F32", "steps": "U8", "origins": "I8"}


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can be stored so."""
    return shape[-1] % GROUP == 0


def size_B(shape: tuple[int, ...]) -> int:
    """Bytes of a weight of this shape."""
    count = math.prod(shape)
    return count // 2 + 2 * (count // GROUP) + 4 * (count // shape[-1])


def find(folder: Folder) -> Iterator[Quantised]:
    """Weights in int4."""
    entries = folder.entries
    for name in entries:
        prefix, dot, role = name.rpartition(".")
        if not dot or role != "int4_steps":
            continue
        base = prefix if prefix in entries else f"{prefix}.weight"
        members = {"codes": member(entries, base, base)}
        members |= {role: member(entries, f"{prefix}.int4_{role}", base) for role in ROLES}
        *outer, packed = members["codes"].shape or (0,)
        for role, entry in members.items():
            if entry.dtype != DTYPES[role]:
                raise damaged(base, f"'{entry.name}' holds {entry.dtype}, {DTYPES[role]} was expected")
        weight = Quantised(base, "int4", (*outer, 2 * packed), members)
        if len(weight.shape) not in (2, 3) or not members["codes"].nbytes or not fits(weight.shape):
            raise damaged(base, f"its codes have the shape {list(members['codes'].shape)}")
        grid = (*outer, 2 * packed // GROUP)
        for role, wanted in (("scales", tuple(outer)), ("steps", grid), ("origins", grid)):
            if members[role].shape != wanted:
                raise damaged(base, f"'{members[role].name}' is {list(members[role].shape)} instead of {list(wanted)}")
        yield weight


def dequantise(weight: Quantised, members: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    """Integers times the scale of their row."""
    from offload.checkpoint.quantized.arithmetic.row_codes import fill_integers

    matrices = range(math.prod(members["codes"].shape[:-2]))
    fill_integers([_codes(members, matrix) for matrix in matrices], members["scales"], target)


def as_stored(members: Mapping[str, torch.Tensor], dtype: torch.dtype) -> RowCodes:
    """A weight that computes in integers."""
    from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes

    return RowCodes.of(_codes(members, 0), members["scales"], dtype)


def _codes(members: Mapping[str, torch.Tensor], matrix: int) -> GroupCodes:
    from offload.checkpoint.quantized.arithmetic.group_codes import GroupCodes

    parts = (members[role] for role in ("codes", "steps", "origins"))
    return GroupCodes(*(part.view(-1, *part.shape[-2:])[matrix] for part in parts))


FORMAT = StoredFormat("specexec int4", (), find, dequantise, {"int4": "int4"}, WHY, as_stored)
