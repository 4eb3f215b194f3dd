"""Which tensors on disk are the parts of one quantised weight. Knows names and headers, no torch and no arithmetic.

A weight in few bits is stored as its codes and their scales under names of their own. `fold` finds these groups and
turns each into one `Quantised` with the shape of the weight that it represents:

    bitsandbytes 4 bit   X, X.absmax, X.quant_map, X.nested_absmax, X.nested_quant_map, X.quant_state.bitsandbytes__nf4
    its stacks           the same for experts in one tensor, state X.quant_state.specexec__nf4 (docs/packs.md)
    int8 by rows         X.weight and X.SCB as bitsandbytes writes them, or X and X.SCB for stacks
    MXFP4 (gpt-oss)      X_blocks and X_scales
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TypeAlias, cast

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import ITEM_B, Folder, read_small
from offload.checkpoint.quantized.formats import METHODS, STORED_FORMATS
from offload.errors import CorruptShard, UnsupportedModel

Scheme: TypeAlias = str  # a key of STORED_FORMATS

UNNAMED = "a method that its config.json does not name"
STATE = ".quant_state."
OWNERS = ("bitsandbytes__nf4", "bitsandbytes__fp4", "specexec__nf4")
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MXFP4_BLOCK = 32
# Members of a stack that have an entry for each of its matrices; tables are common to all.
STACKED = ("codes", "absmax", "nested_absmax", "scales")


@dataclass(frozen=True)
class Quantised:
    """One weight in few bits: its shape when dequantised, and the tensors that hold codes and scales."""

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    members: Mapping[str, Entry]
    """By role: codes, absmax, nested_absmax, nested_quant_map, scales; `other` travels along unread."""
    dtype: str = "F32"
    blocksize: int = 64
    nested_blocksize: int = 256
    matrices: int = 1
    """How many were quantised one by one: the experts along the first dimension, or the whole weight at once."""
    offsets: tuple[float, ...] = ()
    """What was taken off the scales before they were quantised themselves: one for each matrix, or none."""
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

    def alone(self, expert: int) -> "Quantised":
        """One matrix of the stack."""
        offsets = self.offsets[expert : expert + 1]
        return replace(self, shape=(1, *self.shape[1:]), matrices=1, offsets=offsets, expert=expert)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(entry.nbytes for entry in self.members.values())


@dataclass(frozen=True)
class Folded:
    """A folder's tensors, those of quantised weights taken together."""

    dense: Mapping[str, Entry]
    quantised: Mapping[str, Quantised]


def fold(folder: Folder) -> Folded:
    """Take the tensors of each quantised weight together; what does not add up is refused by name."""
    refuse_unknown(folder)
    finders = dict.fromkeys(one.find for one in STORED_FORMATS.values())
    found = {weight.name: weight for finder in finders for weight in resolve_name(finder)(folder)}
    used = {entry.name for weight in found.values() for entry in weight.members.values()}
    return Folded({name: entry for name, entry in folder.entries.items() if name not in used}, found)


def refuse_unknown(folder: Folder) -> None:
    """Raise UnsupportedModel for a method of quantisation that no format here can undo."""
    config = folder.config.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", UNNAMED) if isinstance(config, dict) else UNNAMED
    if method not in METHODS:
        raise UnsupportedModel(
            f"{folder.path} is quantised with {method}, which cannot be streamed.",
            "Streamed are bitsandbytes 4 and 8 bit, MXFP4, GGUF files and specexec's own packs.",
            "the 16-bit version of the model, or a bitsandbytes one (…-bnb-4bit).",
        )


def find_4bit(folder: Folder) -> Iterator[Quantised]:
    """Weights in bitsandbytes' 4 bits; where the files are elsewhere, states cannot be read and shapes are guessed."""
    entries, columns = folder.entries, folder.config.get("hidden_size")
    width = None if folder.here else columns if isinstance(columns, int) and columns > 0 else 1
    for name, entry in entries.items():
        base, found, owner = name.partition(STATE)
        if not found or owner not in OWNERS:
            continue
        members = {"codes": _member(entries, base, base), "other": entry}
        for role in ("absmax", "nested_absmax", "nested_quant_map", "quant_map"):
            if f"{base}.{role}" in entries:
                members[role] = entries[f"{base}.{role}"]
        _member(entries, f"{base}.absmax", base)
        state = _state(entry) if width is None else _usual_state(owner, members, width)
        yield _from_state(base, owner, members, state)


def _state(entry: Entry) -> dict[str, object]:
    try:
        state = json.loads(read_small(entry))
    except ValueError as error:
        raise _damaged(entry.name, f"its state is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise _damaged(entry.name, "its state is not a JSON object")
    return cast("dict[str, object]", state)


def _usual_state(owner: str, members: Mapping[str, Entry], width: int) -> dict[str, object]:
    """What a state says of a matrix with so many codes, as bitsandbytes writes it; its rows are guessed."""
    codes, nested = members["codes"], "nested_absmax" in members
    stack = list(codes.shape[:1]) if owner.startswith("specexec") else []
    each = 2 * codes.nbytes // math.prod(stack)
    columns = width if each % width == 0 else 1
    offsets = [0.0] * math.prod(stack) if nested else []
    return {
        "shape": [*stack, each // columns, columns], "blocksize": 64, "nested_blocksize": 256, "dtype": "bfloat16",
        "quant_type": owner.partition("__")[2], "nested_offset": offsets,
    }  # fmt: skip


def _from_state(base: str, owner: str, members: Mapping[str, Entry], state: Mapping[str, object]) -> Quantised:
    nested = "nested_absmax" in members
    offsets = state.get("nested_offset", [])
    offsets = offsets if isinstance(offsets, list) else [offsets]
    shape, sizes = state.get("shape"), (state.get("blocksize"), state.get("nested_blocksize", 256))
    sound = (
        isinstance(shape, list)
        and all(type(number) is int and number > 0 for number in (*shape, *sizes))
        and all(isinstance(offset, float) for offset in offsets)
        and state.get("dtype") in FLOATS
        and state.get("quant_type") == owner.partition("__")[2]
        and ("nested_quant_map" in members) == nested == bool(offsets)
    )
    if not sound:
        raise _damaged(base, "its quantisation state makes no sense")
    dense = tuple(cast("list[int]", shape))
    weight = Quantised(
        name=base,
        scheme="nf4" if owner.endswith("nf4") else "fp4",
        shape=dense,
        members=members,
        dtype=FLOATS[str(state["dtype"])],
        blocksize=cast("int", sizes[0]),
        nested_blocksize=cast("int", sizes[1]),
        matrices=dense[0] if owner.startswith("specexec") else 1,
        offsets=tuple(cast("list[float]", offsets)),
    )
    stacked = weight.matrices
    each = math.prod(weight.shape) // stacked
    blocks = -(-each // weight.blocksize)
    wanted = {"codes": stacked * (-(-each // 2)), "absmax": stacked * blocks * (1 if nested else 4)}
    if nested:
        wanted |= {"nested_absmax": stacked * -(-blocks // weight.nested_blocksize) * 4, "nested_quant_map": 1024}
    _check(weight, wanted)
    if nested and len(offsets) != stacked:
        raise _damaged(base, f"it has {len(offsets)} offsets for {stacked} matrices")
    return weight


def find_int8(folder: Folder) -> Iterator[Quantised]:
    """Weights in 8 bits with one scale a row."""
    entries = folder.entries
    for name, scales in entries.items():
        prefix, dot, role = name.rpartition(".")
        if not dot or role != "SCB":
            continue
        base = prefix if prefix in entries else f"{prefix}.weight"
        codes = _member(entries, base, name)
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
            raise _damaged(base, f"its codes are {codes.dtype} and its scales {scales.dtype}")
        _check(weight, {"scales": math.prod(codes.shape[:-1]) * 4})
        yield weight


def find_mxfp4(folder: Folder) -> Iterator[Quantised]:
    """Stacks of experts in MXFP4."""
    entries = folder.entries
    for name, codes in entries.items():
        base = name.removesuffix("_blocks")
        scales = entries.get(f"{base}_scales")
        if base == name or scales is None:
            continue
        if len(codes.shape) != 4 or codes.shape[:-1] != scales.shape or codes.dtype != "U8" or scales.dtype != "U8":
            raise _damaged(base, f"blocks {list(codes.shape)} and scales {list(scales.shape)} do not match")
        experts, rows, groups, packed = codes.shape
        # Stored output by output; the module keeps the transpose.
        yield Quantised(
            base, "mxfp4", (experts, groups * packed * 2, rows), {"codes": codes, "scales": scales}, dtype="BF16"
        )


def _member(entries: Mapping[str, Entry], name: str, base: str) -> Entry:
    if name not in entries:
        raise _damaged(base, f"'{name}' is missing")
    return entries[name]


def _check(weight: Quantised, wanted_B: Mapping[str, int]) -> None:
    for role, nbytes in wanted_B.items():
        found = weight.members[role]
        if found.nbytes != nbytes or found.dtype not in ITEM_B:
            raise _damaged(weight.name, f"'{found.name}' has {found.nbytes} bytes, {nbytes} were expected")


def _damaged(name: str, why: str) -> CorruptShard:
    return CorruptShard(f"the quantised weight '{name}' is damaged: {why}.", hint="download the model again.")
