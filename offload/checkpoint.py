"""A checkpoint laid out for streaming: which bytes make layer i, and which the rest (embeddings, norms, head).

Every tensor the module needs is accounted for, with its shape and a dtype that can be converted, before anything is
read; nothing is ever newly initialised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from offload.conversion import Part, route
from offload.errors import BadModelDir, UnsupportedArchitecture
from offload.packed import Packed
from offload.quantised import Folded, Quantised, fold
from offload.shards import SCRATCH_B, Entry, Folder

# Unaligned views once changed one-row float32 results by 1e-5; 64 bytes is what torch's own allocator gives.
ALIGN_B = 64
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CONVERTIBLE = {torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """One tensor of a block: where it lies in the block's buffer and which bytes on disk make it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in the compute dtype."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor inside a block's buffer."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def target(self, part: Part, flat: torch.Tensor) -> torch.Tensor:
        """Where the part belongs inside a block's buffer."""
        start = self.offset // self.dtype.itemsize + part.offset
        return self.view(flat).as_strided(part.entry.shape, part.stride, start)

    def direct(self, part: Part) -> bool:
        """Can the bytes be read straight into place?"""
        if DTYPES[part.entry.dtype] != self.dtype:
            return False
        return torch.empty_strided(part.entry.shape, part.stride, device="meta").is_contiguous()


@dataclass(frozen=True)
class Copy:
    """Bytes of a file that belong at `offset` of the buffer as they are."""

    entry: Entry
    offset: int


@dataclass(frozen=True)
class Block:
    """What is read at once: one layer, or one tensor of the rest."""

    label: str
    pieces: tuple[Piece, ...]
    packed: tuple[Packed, ...] = ()

    @property
    def dense_B(self) -> int:
        """Bytes of the scratch memory that holds what is dequantised for as long as the block is in use."""
        return sum(aligned(tensor.nbytes) for tensor in self.packed)

    @property
    def kept_B(self) -> int:
        """Bytes of a block of the rest, which is dequantised for good."""
        return self.dense_B or self.size_B

    @property
    def size_B(self) -> int:
        """Bytes of the buffer that holds it."""
        last = self.pieces[-1]
        return last.offset + aligned(last.nbytes)

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """All that is read straight into place, in file order so that neighbours can be read at once."""
        found = [
            Copy(part.entry, piece.offset + part.offset * piece.dtype.itemsize)
            for piece in self.pieces
            for part in piece.parts
            if piece.direct(part)
        ]
        return tuple(sorted(found, key=lambda copy: (copy.entry.file, copy.entry.offset)))

    @cached_property
    def conversions(self) -> tuple[tuple[Piece, Part], ...]:
        """All that changes its dtype or its order on the way."""
        return tuple((piece, part) for piece in self.pieces for part in piece.parts if not piece.direct(part))

    @property
    def read_B(self) -> int:
        """Bytes that come from disk."""
        return sum(part.entry.nbytes for piece in self.pieces for part in piece.parts)

    @property
    def scratch_B(self) -> int:
        """Bytes needed beside the buffer while converting."""
        return max((rows.nbytes for _, part in self.conversions for _, rows in part.entry.slices(SCRATCH_B)), default=0)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """What travels, by name and all inside `flat`: tensors as the model wants them, and codes and scales."""
        return {piece.name: piece.view(flat) for piece in self.pieces}

    def dense(self, tensors: Mapping[str, torch.Tensor], scratch: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """What the model wants, by name: codes and scales among `views` dequantised into `scratch`."""
        if not self.packed:
            return tensors
        assert scratch is not None
        members = {
            entry.name for item in self.packed for _, weight in item.sources for entry in weight.members.values()
        }
        ready = {name: tensor for name, tensor in tensors.items() if name not in members}
        return ready | {item.name: item.unpack(tensors, scratch) for item in self.packed}


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor the module needs and where its bytes are: layers to stream, the rest to keep."""

    path: Path
    layers: tuple[Block, ...]
    rest: tuple[Block, ...]
    file_sizes: Mapping[Path, int]

    @property
    def bytes_per_sweep(self) -> int:
        """What one sweep over the layers reads."""
        return sum(block.read_B for block in self.layers)

    @property
    def layer_B(self) -> int:
        """Bytes of the buffer that can hold any layer."""
        return max(block.size_B for block in self.layers)

    @property
    def dense_B(self) -> int:
        """Bytes of the scratch memory that holds any layer dequantised."""
        return max(block.dense_B for block in self.layers)

    @property
    def scratch_B(self) -> int:
        """Bytes needed beside the buffers while converting."""
        return max(block.scratch_B for block in (*self.layers, *self.rest))


def lay_out(folder: Folder, skeleton: PreTrainedModel, layers: str, dtype: torch.dtype) -> Checkpoint:
    """Lay the folder out for `skeleton`, whose decoder layers are the children of the module named `layers`."""
    tensors = skeleton.state_dict()
    folded = fold(folder)
    parts = route([*folded.dense.values(), *(weight.whole for weight in folded.quantised.values())], skeleton)
    _refuse_missing(tensors.keys() - parts.keys(), skeleton, folder.path)
    places = _Places(folded, parts, {name: tuple(tensors[name].shape) for name in parts}, {})
    for name, found in parts.items():
        places.dtypes[name] = _compute_dtype(name, tensors[name], skeleton, dtype)
        _check_dtype([part for part in found if part.entry.name not in folded.quantised], places.dtypes[name])
    by_layer: dict[int, list[str]] = {}
    rest: list[Block] = []
    for name in parts:
        if name.startswith(f"{layers}."):
            by_layer.setdefault(int(name.removeprefix(f"{layers}.").split(".")[0]), []).append(name)
        else:
            rest.append(places.block(name, [name], ""))
    blocks = tuple(places.block(f"layer {i}", names, f"{layers}.{i}.") for i, names in sorted(by_layer.items()))
    return Checkpoint(folder.path, blocks, tuple(rest), folder.file_sizes)


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGN_B) * ALIGN_B


@dataclass(frozen=True)
class _Places:
    """What the module wants and where it comes from, by the module's names."""

    folded: Folded
    parts: Mapping[str, list[Part]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def block(self, label: str, names: Sequence[str], prefix: str) -> Block:
        """The named tensors one after another, those that are quantised beside them in the scratch memory."""
        packed: list[Packed] = []
        wanted: list[tuple[str, torch.dtype, tuple[int, ...], tuple[Part, ...]]] = []
        members: dict[str, Entry] = {}
        offset = 0
        for name in names:
            short, parts = name.removeprefix(prefix), tuple(self.parts[name])
            if not any(part.entry.name in self.folded.quantised for part in parts):
                wanted.append((short, self.dtypes[name], self.shapes[name], parts))
                continue
            packed.append(Packed(short, self.dtypes[name], self.shapes[name], offset, self._sources(name)))
            offset += aligned(packed[-1].nbytes)
            members |= {entry.name: entry for _, held in packed[-1].sources for entry in held.members.values()}
        wanted += [(name, DTYPES[entry.dtype], entry.shape, (_as_stored(entry),)) for name, entry in members.items()]
        # In file order the pieces of a layer that is stored in one run are read with one call.
        wanted.sort(key=lambda item: min((part.entry.file, part.entry.offset) for part in item[3]))
        pieces: list[Piece] = []
        offset = 0
        for name, dtype, shape, parts in wanted:
            pieces.append(Piece(name, dtype, shape, offset, parts))
            offset += aligned(pieces[-1].nbytes)
        return Block(label, tuple(pieces), tuple(packed))

    def _sources(self, name: str) -> tuple[tuple[Part, Quantised], ...]:
        quantised = self.folded.quantised
        plain = [part.entry.name for part in self.parts[name] if part.entry.name not in quantised]
        if plain:
            raise UnsupportedArchitecture(
                f"'{name}' is made of quantised tensors and of '{plain[0]}', which is not quantised.",
                hint="a version of the model that quantises all of them or none.",
            )
        return tuple((part, quantised[part.entry.name]) for part in self.parts[name])


def _as_stored(entry: Entry) -> Part:
    return Part(entry, entry.name, torch.empty(entry.shape, device="meta").stride(), 0)


def _compute_dtype(name: str, tensor: torch.Tensor, skeleton: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """What transformers would load it as: modules that must stay in float32 do."""
    for pattern, kept in skeleton._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    return tensor.dtype


def _check_dtype(parts: Sequence[Part], wanted: torch.dtype) -> None:
    for entry in (part.entry for part in parts):
        found = DTYPES.get(entry.dtype)
        if found != wanted and not {found, wanted} <= CONVERTIBLE:
            raise UnsupportedArchitecture(
                f"'{entry.name}' is stored as {entry.dtype} and needed as {str(wanted).removeprefix('torch.')}.",
                "It is quantised in a way that cannot be streamed.",
                "the 16-bit version of the model.",
            )


def _refuse_missing(names: set[str], skeleton: PreTrainedModel, path: Path) -> None:
    """Refuse what is neither stored nor tied to something stored."""
    tied = skeleton.all_tied_weights_keys
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
    excused = {name for group in groups.values() if not group <= names for name in group}
    missing = sorted(names - excused)
    if missing:
        raise BadModelDir(
            f"{path} lacks {len(missing)} tensors that {type(skeleton).__name__} needs: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}.",
            "The checkpoint is incomplete, or config.json describes another model.",
            "download the model again.",
        )
