"""Weights of GGUF files: which they are, by their names alone, and how they become dense. Imports no torch.

A name says the type of the blocks, what the converter did to the values, and where they belong; see gguf/names.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.entry import Entry, placed
from offload.checkpoint.gguf.ggml_types import BY_NAME, GgmlType
from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat
from offload.errors import CorruptShard

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"(?P<base>.+)\.gguf\.(?P<kind>[A-Z0-9_]+)(?:\.(?P<undo>plus1|log))?")


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
    codes = members["codes"]
    fill_rows(match["kind"], codes.reshape(-1, codes.shape[-1]), target, match["undo"])


def _weight(entry: Entry, match: re.Match[str]) -> Quantised:
    kind, (_, place) = BY_NAME.get(match["kind"]), placed(match["base"])
    shape = _dense_shape(entry, kind) if kind else None
    if kind is None or shape is None or (place and place.items != math.prod(shape)):
        raise CorruptShard(
            f"'{entry.name}' is {entry.dtype} {list(entry.shape)}, which its name does not allow.",
            hint="the GGUF file or the pack again.",
        )
    scheme = "ggml_mxfp4" if kind.name == "MXFP4" else kind.name.lower()
    shape = place.sizes if place else shape
    return Quantised(match["base"], scheme, shape, {"codes": entry}, dtype=kind.plain or "F32")


def _dense_shape(entry: Entry, kind: GgmlType) -> tuple[int, ...] | None:
    if kind.plain:
        return entry.shape if entry.dtype == kind.plain and entry.shape else None
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
