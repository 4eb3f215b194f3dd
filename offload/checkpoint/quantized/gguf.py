"""Weights of GGUF files: which they are, by their names alone, and how they become dense. Imports no torch.

A name says the type of the blocks and what the converter did to the values; see gguf/names.py. `pairs9` is undone while
the rows are written: rows 2i and 2i + 1 of a head are rows i and i + D/2 of the module.   D rows of a head
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.entry import Entry
from offload.checkpoint.gguf.ggml_types import BY_NAME, GgmlType
from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat
from offload.errors import CorruptShard

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"(?P<base>.+)\.gguf\.(?P<kind>[A-Z0-9_]+)(?:\.(?P<undo>pairs[1-9]\d{0,5}|plus1))?")


def find(folder: Folder) -> Iterator[Quantised]:
    """Each tensor whose name ends with a type of ggml's."""
    for name, entry in folder.entries.items():
        if match := NAME.fullmatch(name):
            yield _weight(entry, match)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Fill the dense weight, a run of rows at a time, by the same steps wherever it computes."""
    from offload.checkpoint.quantized.arithmetic.ggml_blocks import fill_rows

    match = NAME.fullmatch(weight.members["codes"].name)
    assert match is not None
    undo = match["undo"] or ""
    pairs = int(undo.removeprefix("pairs")) if undo.startswith("pairs") else 0
    rows = target if target.dim() > 1 else target[:, None] if pairs else target[None]
    codes = members["codes"].reshape(rows.shape[0], -1)
    if pairs:  # as they are stored: both halves of a head in turns
        rows = rows.view(pairs, 2, rows.shape[0] // pairs // 2, -1).transpose(1, 2)
    fill_rows(match["kind"], codes, rows, less=1.0 if undo == "plus1" else 0.0)


def _weight(entry: Entry, match: re.Match[str]) -> Quantised:
    kind, undo = BY_NAME.get(match["kind"]), match["undo"] or ""
    shape = _dense_shape(entry, kind) if kind else None
    pairs = int(undo.removeprefix("pairs")) if undo.startswith("pairs") else 0
    if kind is None or shape is None or (pairs and shape[0] % (2 * pairs)):
        raise CorruptShard(
            f"'{entry.name}' is {entry.dtype} {list(entry.shape)}, which its name does not allow.",
            hint="the GGUF file or the pack again.",
        )
    scheme = "ggml_mxfp4" if kind.name == "MXFP4" else kind.name.lower()
    return Quantised(match["base"], scheme, shape, {"codes": entry}, dtype=kind.plain or "F32")


def _dense_shape(entry: Entry, kind: GgmlType) -> tuple[int, ...] | None:
    if kind.plain:
        return entry.shape if entry.dtype == kind.plain else None
    if entry.dtype != "U8" or not entry.shape or entry.shape[-1] % kind.nbytes or not math.prod(entry.shape):
        return None
    return (*entry.shape[:-1], entry.shape[-1] // kind.nbytes * kind.items)


# Floats, where a converter changed their values or their order.
FLOAT_SCHEMES = ("f32", "f16", "bf16")
# ggml's types by what they cost. MXFP4 has another name here: gpt-oss' own files hold it in another layout.
_SPEEDS = {
    "nf4": ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "ggml_mxfp4"),
    "int8": ("q8_0", *FLOAT_SCHEMES),
}
FORMAT = StoredFormat(
    "GGUF files",
    ("gguf",),
    find,
    dequantise,
    {scheme: speed for speed, schemes in _SPEEDS.items() for scheme in schemes},
    "its weights are in the blocks of a GGUF file",
)
