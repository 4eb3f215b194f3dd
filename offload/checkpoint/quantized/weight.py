"""One weight in few bits, and what a format says of such weights. Knows names and headers, no torch, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from offload.checkpoint.documents import Json
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import ITEM_B, Folder
from offload.errors import CorruptShard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Scheme: TypeAlias = str  # a key of some format's `schemes`

FLOATS = ("F16", "BF16", "F32")
# On a GPU so much of a weight is dequantised at a time, in float32, and so often it is there at once while it is.
GPU_PIECE_B = 32 << 20
GPU_PIECES = 6
# Scales in a float of their own, before and after they are multiplied or put in order.
SCALES, SCALE_COPIES = ("scales", "absmax", "nested_absmax", "biases"), 3
# Members of a stack that have an entry for each of its matrices; tables are common to all.
STACKED = ("codes", "absmax", "nested_absmax", "scales", "steps", "origins")


@dataclass(frozen=True)
class Quantised:
    """One weight in few bits: its shape when dequantised, and the tensors that hold codes and scales."""

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    members: Mapping[str, Entry]
    """By role: codes, scales and what else its format computes with; other roles travel along unread."""
    dtype: str = "F32"
    blocksize: int = 64
    nested_blocksize: int = 256
    matrices: int = 1
    """How many were quantised one by one: the experts along the first dimension, or the whole weight at once."""
    offsets: tuple[float, ...] = ()
    """What was taken off the scales before they were quantised themselves: one for each matrix, or none."""
    block: tuple[int, int] = (1, 1)
    """How many outputs and how many inputs share a scale."""
    bits: int = 0
    """Of a code, where its format has several."""
    expert: int | None = None
    """Which matrix of a stack it is, where members hold the whole stack."""

    @property
    def whole(self) -> Entry:
        """The dense weight as an entry that can be routed and cut into rows, a byte for each element."""
        file = self.members["codes"].file
        return Entry(self.name, file, 0, math.prod(self.shape), self.scheme, self.shape)

    @property
    def is_stack(self) -> bool:
        """Can each matrix along the first dimension be computed from its own rows of the members?"""
        held = [self.members[role] for role in STACKED if role in self.members]
        return len(self.shape) == 3 and all(entry.shape[:1] == self.shape[:1] for entry in held)

    @property
    def stays(self) -> bool:
        """Can a head compute from its codes? Where scales are floats of their own, for blocks of 64."""
        return self.scheme == "nf4" and len(self.shape) == 2 and not self.offsets and self.blocksize == 64

    @property
    def tables_B(self) -> int:
        """Most that a GPU holds of it beside pieces while it is dequantised: scales in float32, codes turned round."""
        scales = sum(math.prod(one.shape) for role, one in self.members.items() if role in SCALES)
        turned_B = self.members["codes"].nbytes // self.shape[0] if self.scheme == "mxfp4" else 0
        return 4 * SCALE_COPIES * scales + turned_B

    def alone(self, expert: int) -> Quantised:
        """One matrix of the stack."""
        offsets = self.offsets[expert : expert + 1]
        return replace(self, shape=(1, *self.shape[1:]), matrices=1, offsets=offsets, expert=expert)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(entry.nbytes for entry in self.members.values())


@dataclass(frozen=True)
class StoredFormat:
    """One way to store weights in few bits."""

    title: str
    """What people call it."""
    methods: tuple[str, ...]
    """What quantization_config in config.json may call it."""
    find: Callable[[Folder], Iterable[Quantised]]
    """Each weight of the folder that is stored so. What does not add up raises CorruptShard and names the weight."""
    dequantise: Callable[[Quantised, Mapping[str, Tensor], Tensor], None]
    """Fills a dense tensor, of the weight's shape and in the compute dtype, from the weight's members by role."""
    speeds: Mapping[Scheme, Scheme]
    """What `Quantised.scheme` may say, and the measured scheme that it dequantises about as fast as, for `plan`."""
    foreign: str | None = None
    """Why plain transformers loads no folder of such tensors, where it does not."""
    as_stored: Callable[[Mapping[str, Tensor], torch.dtype], Tensor] | None = None
    """From its members by role: a matrix that takes part in arithmetic of a dtype and multiplies as it is stored."""


@dataclass(frozen=True)
class Words:
    """A weight as AWQ and GPTQ name its tensors: X.qweight [words, …] and X.qzeros in I32, X.scales [G, O]."""

    prefix: str
    codes: Entry
    scales: Entry
    zeros: Entry

    @property
    def name(self) -> str:
        """Of the dense weight."""
        return f"{self.prefix}.weight"

    @property
    def members(self) -> dict[str, Entry]:
        """By role."""
        return {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}

    @property
    def misfit(self) -> CorruptShard:
        """What to say where they do not fit each other."""
        shapes = [f"'{one.name}' {one.dtype} {list(one.shape)}" for one in (self.codes, self.zeros, self.scales)]
        return damaged(self.name, f"{shapes[0]}, {shapes[1]} and {shapes[2]} do not fit each other")


def words_in(folder: Folder) -> Iterator[Words]:
    """Each weight that is named so. Raises CorruptShard, which names it, for types and dimensions of another kind."""
    entries = folder.entries
    for name, codes in entries.items():
        prefix, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        base = f"{prefix}.weight"
        found = Words(
            prefix, codes, member(entries, f"{prefix}.scales", base), member(entries, f"{prefix}.qzeros", base)
        )
        flat = all(len(one.shape) == 2 and one.nbytes for one in (codes, found.scales, found.zeros))
        if not flat or (codes.dtype, found.zeros.dtype) != ("I32", "I32") or found.scales.dtype not in FLOATS:
            raise found.misfit
        yield found


def settings_of(folder: Folder, methods: Collection[str]) -> Mapping[str, Json] | None:
    """What config.json says of a quantisation by one of these methods; None where it names none of them.

    A pack of ours that changed the head keeps what was said of the other weights.
    """
    config = folder.config.get("quantization_config")
    if isinstance(config, dict) and config.get("quant_method") == "specexec":
        config = config.get("layers")
    return config if isinstance(config, dict) and config.get("quant_method") in methods else None


def member(entries: Mapping[str, Entry], name: str, base: str) -> Entry:
    """The tensor `name`, which is part of the weight `base`. Raises CorruptShard where it is missing."""
    if name not in entries:
        raise damaged(base, f"'{name}' is missing")
    return entries[name]


def order_of(entries: Mapping[str, Entry], name: str, base: str, inputs: int) -> dict[str, Entry]:
    """Which group each input of the weight `base` is in, by role, where a tensor `name` says so."""
    if name not in entries:
        return {}
    order = entries[name]
    if order.dtype not in ("I32", "I64") or order.shape != (inputs,):
        raise damaged(base, f"'{name}' is {order.dtype} {list(order.shape)} for {inputs} inputs")
    return {"order": order}


def beside(entries: Mapping[str, Entry], prefix: str, names: Iterable[str]) -> dict[str, Entry]:
    """Tensors of a module that belong to its weight and stay unread, by their names."""
    return {name: entries[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in entries}


def check_sizes(weight: Quantised, wanted_B: Mapping[str, int]) -> None:
    """Raise CorruptShard unless each member by role has so many bytes."""
    for role, nbytes in wanted_B.items():
        found = weight.members[role]
        if found.nbytes != nbytes or found.dtype not in ITEM_B:
            raise damaged(weight.name, f"'{found.name}' has {found.nbytes} bytes, {nbytes} were expected")


def damaged(name: str, why: str) -> CorruptShard:
    """What to say of a weight whose tensors do not belong together."""
    return CorruptShard(f"the quantised weight '{name}' is damaged: {why}.", hint="download the model again.")
