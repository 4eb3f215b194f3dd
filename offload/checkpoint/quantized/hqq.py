"""HQQ in 1, 2, 3, 4 or 8 bits, groups along either side of a weight. Imports no torch.

Of X.weight [O, I]: X.W_q holds its codes as hqq packs them, X.scale and X.zero a number for each group, and small
tensors say the rest: X.shape, X.nbits, X.axis, X.group_size … (hqq's state_dict as transformers saves it). The weight's
items in their order make a matrix of groups: [groups, size] by axis 1, [size, groups] by axis 0. Several of its rows
share a word: the first W of them have the highest bits, the next W the bits after those, and so on.   O outputs   I
inputs   W rows of words
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_small
from offload.checkpoint.quantized.weight import (
    FLOATS,
    Quantised,
    StoredFormat,
    beside,
    damaged,
    member,
    settings_of,
)
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "hqq"
# By the bits of a code: how many share a word, and the bytes of a word.
WORDS = {1: (8, 1), 2: (4, 1), 3: (10, 4), 4: (2, 1), 8: (1, 1)}
NUMBERS = {"U8": "B", "I8": "b", "I32": "i", "I64": "q"}
UNREAD = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
WHY = "transformers 5 loads no folder that hqq has quantised"


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight with codes of hqq's."""
    if settings_of(folder, (METHOD,)) is None:
        return
    for name, codes in folder.entries.items():
        prefix, _, last = name.rpartition(".")
        if last == "W_q":
            yield _weight(folder, prefix, codes)


def _weight(folder: Folder, prefix: str, codes: Entry) -> Quantised:
    name, entries = f"{prefix}.weight", folder.entries
    if not folder.here:
        raise UnsupportedModel(
            f"'{name}' is quantised with hqq, whose shapes are known from its files alone.",
            None,
            "specexec pull, and then the folder.",
        )
    others = beside(entries, prefix, UNREAD)
    if f"{prefix}.scale" not in entries or f"{prefix}.zero" not in entries:
        raise UnsupportedModel(
            f"'{name}' is quantised with hqq, and its scales or zero points are quantised themselves.",
            None,
            "a version of the model without that, or the 16-bit one.",
        )
    scales, zeros = member(entries, f"{prefix}.scale", name), member(entries, f"{prefix}.zero", name)
    shape, (bits,), (axis,) = (_numbers(entries, prefix, role, name) for role in ("shape", "nbits", "axis"))
    sound = len(shape) == 2 and min(shape) > 0 and bits in WORDS and axis in (0, 1)
    if not sound or {scales.dtype, zeros.dtype} - {*FLOATS} or not codes.nbytes or len(codes.shape) != 2:
        raise damaged(name, f"it is said to be {list(shape)} in {bits} bits along axis {axis}")
    (O, I), groups = shape, math.prod(scales.shape)
    size = O * I // groups if groups else 0
    rows, columns = (groups, size) if axis == 1 else (size, groups)
    share, word_B = WORDS[bits]
    fits = size * groups == O * I and columns * word_B * -(-rows // share) == codes.nbytes
    # Rows of the weight must be made of whole groups, or groups of whole rows.
    if not fits or zeros.shape != scales.shape or (I % size if axis == 1 else groups % I):
        raise damaged(name, f"'{codes.name}' {list(codes.shape)} and '{scales.name}' {list(scales.shape)} do not fit")
    members = {"codes": codes, "scales": scales, "zeros": zeros, **others}
    block = (1, size) if axis == 1 else (size, 1)
    return Quantised(name, f"hqq_{bits}bit", (O, I), members, block=block, bits=bits)


def _numbers(entries: Mapping[str, Entry], prefix: str, role: str, name: str) -> tuple[int, ...]:
    entry = member(entries, f"{prefix}.{role}", name)
    count = math.prod(entry.shape)
    if entry.dtype not in NUMBERS or not 0 < count <= 2:
        raise damaged(name, f"'{entry.name}' is {entry.dtype} {list(entry.shape)}")
    found = struct.unpack(f"<{count}{NUMBERS[entry.dtype]}", read_small(entry))
    return found if role == "shape" or count == 1 else (-1,)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale in float32, some rows of the weight at a time."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import fill_rows

    (O, I), bits = weight.shape, weight.bits
    share, word_B = WORDS[bits]
    by_row = weight.block[0] == 1
    # Units: groups, or rows of the weight. A row of words holds `each` of them side by side.
    width = weight.block[1] if by_row else I
    each = 1 if by_row else O // weight.block[0]
    kind = torch.uint8 if word_B == 1 else torch.int32
    words = members["codes"].contiguous().view(kind).view(-1, width)
    scales, zeros = (members[role].reshape(-1, 1 if by_row else I) for role in ("scales", "zeros"))
    held = len(words) // each  # rows of words

    def values(rows: slice) -> Tensor:
        per_row = I // width
        unit = torch.arange(rows.start * per_row, rows.stop * per_row, device=words.device)
        row, column = unit // each, unit % each
        shift = (bits * (share - 1 - row // held)).to(kind)[:, None]
        codes = (words.index_select(0, row % held * each + column) >> shift) & (2**bits - 1)
        own = unit if by_row else column
        zero, scale = (grid.index_select(0, own).float() for grid in (zeros, scales))
        return ((codes.float() - zero) * scale).view(-1, I)

    fill_rows(target, values)


SPEEDS = {f"hqq_{bits}bit": "int8" if bits == 8 else "nf4" for bits in WORDS}
FORMAT = StoredFormat("HQQ", (METHOD,), find, dequantise, SPEEDS, WHY)
