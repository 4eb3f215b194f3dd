"""A checkpoint laid out for streaming: which bytes make layer i, and which the rest (embeddings, norms, head).

Every tensor the module needs is accounted for, with its shape and a dtype that can be converted, before anything is
read; nothing is ever newly initialised.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from offload.checkpoint.block import Block, Sum, TensorPart, aligned
from offload.checkpoint.entry import Change, Entry
from offload.checkpoint.experts import experts_of
from offload.checkpoint.headers import Folder
from offload.checkpoint.mapping import Part, route
from offload.checkpoint.quantized.formats import computes_as_stored
from offload.checkpoint.quantized.packed import Packed
from offload.checkpoint.quantized.stored import Folded, check_orders, fold
from offload.checkpoint.quantized.weight import STACKED, Quantised
from offload.checkpoint.routing import routing_of
from offload.checkpoint.skeleton import Skeleton
from offload.checkpoint.tensors import DTYPES
from offload.errors import BadModelDir, UnsupportedModel

CONVERTIBLE = {torch.float32, torch.float16, torch.bfloat16}


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
    def in_integers(self) -> Literal["all", "some", "none"]:
        """Which of the layers' matrices compute as they are stored."""
        packed = [item.in_integers for block in self.layers for item in block.packed]
        pieces = [piece for block in self.layers for piece in block.pieces if piece.dtype.is_floating_point]
        dense = any(len(piece.shape) > 1 for piece in pieces)
        return "none" if not any(packed) else "some" if dense or not all(packed) else "all"

    @property
    def scratch_B(self) -> int:
        """Bytes needed beside the buffers while converting."""
        return max(block.scratch_B for block in (*self.layers, *self.rest))


def lay_out(folder: Folder, skeleton: Skeleton, *, in_place: bool = False, in_integers: bool = False) -> Checkpoint:
    """Lay the folder out for the skeleton that was built from it.

    `in_place`: tensors of layers may begin at any multiple of their items, where it saves reads a copy (CPUs only).
    `in_integers`: linears of the layers whose weights are int8 by rows multiply them as they are stored.
    """
    layers = skeleton.layers
    places = _places_in(folder, skeleton, in_integers=in_integers)
    by_layer: dict[int, list[str]] = {}
    rest: list[Block] = []
    for name in places.parts:
        if name.startswith(f"{layers}."):
            by_layer.setdefault(int(name.removeprefix(f"{layers}.").split(".")[0]), []).append(name)
        else:
            rest.append(places.block(name, [name], ""))
    blocks = [
        _layer(places, folder, skeleton, index, names, in_place=in_place) for index, names in sorted(by_layer.items())
    ]
    return Checkpoint(folder.path, tuple(blocks), tuple(rest), folder.file_sizes)


def lay_out_layers(folder: Folder, skeleton: Skeleton, indices: Iterable[int]) -> Checkpoint:
    """The same of some layers alone, where the folder holds nothing else."""
    starts = {index: f"{skeleton.layers}.{index}." for index in indices}
    places = _places_in(folder, skeleton, within=tuple(starts.values()))
    blocks = (
        _layer(places, folder, skeleton, index, [name for name in places.parts if name.startswith(start)])
        for index, start in starts.items()
    )
    return Checkpoint(folder.path, tuple(blocks), (), folder.file_sizes)


def _places_in(
    folder: Folder, skeleton: Skeleton, within: str | tuple[str, ...] = "", *, in_integers: bool = False
) -> "_Places":
    """Where everything is that the model wants whose names begin with `within`."""
    model = skeleton.model
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(within)}
    folded = fold(folder)
    if folder.here:
        check_orders(folded)
    entries = [*folded.dense.values(), *(weight.whole for weight in folded.quantised.values())]
    parts = route(entries, skeleton.whole, skeleton.wrapper.own_name if skeleton.wrapper else str)
    _refuse_missing(tensors.keys() - parts.keys(), model, folder.path)
    linears = _linears(model, skeleton.layers) if in_integers else frozenset()
    changes = _changes(folder, skeleton, parts) if folder.changes and not within else {}
    shapes = {name: tuple(tensors[name].shape) for name in parts}
    places = _Places(folded, parts, shapes, {}, linears - changes.keys(), changes)
    for name, found in parts.items():
        places.dtypes[name] = _compute_dtype(name, tensors[name], model, skeleton.dtype)
        _check_dtype([part for part in found if part.entry.name not in folded.quantised], places.dtypes[name])
    return places


def _layer(
    places: "_Places", folder: Folder, skeleton: Skeleton, index: int, names: list[str], *, in_place: bool = False
) -> Block:
    routing, start = routing_of(folder.config), f"{skeleton.layers}.{index}."
    found = experts_of(skeleton.layer_list[index]) if routing else None
    experts = f"{start}{found[0]}." if found else None
    block = places.block(f"layer {index}", names, start, experts, in_place=in_place)
    return replace(block, routing=routing if experts else None)


@dataclass(frozen=True)
class _Places:
    """What the module wants and where it comes from, by the module's names."""

    folded: Folded
    parts: Mapping[str, list[Part]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    in_integers: frozenset[str]
    """Weights that compute in integers where they are stored so."""
    changes: Mapping[str, Sequence[Change]]
    """What is added to them."""

    def block(
        self, label: str, names: Sequence[str], prefix: str, experts: str | None = None, *, in_place: bool = False
    ) -> Block:
        """The named tensors one after another, those that are quantised beside them in the scratch memory.

        Tensors whose names begin with `experts` have one expert along their first dimension.
        """
        packed: list[Packed] = []
        wanted: list[tuple[str, torch.dtype, tuple[int, ...], tuple[Part, ...]]] = []
        members: dict[str, tuple[Entry, tuple[Part, ...]]] = {}
        offset = 0
        for name in names:
            short, parts = name.removeprefix(prefix), tuple(self.parts[name])
            if experts and name.startswith(experts):
                parts = tuple(cut for part in parts for cut in self._by_expert(part, self.shapes[name]))
            if not any(part.entry.name in self.folded.quantised for part in parts):
                wanted.append((short, self.dtypes[name], self.shapes[name], parts))
                continue
            sources = self._sources(name, parts)
            alone = len(sources) == 1 and sources[0][1].shape == self.shapes[name]
            in_integers = alone and computes_as_stored(sources[0][1].scheme) and name in self.in_integers
            packed.append(Packed(short, self.dtypes[name], self.shapes[name], offset, sources, in_integers))
            offset += aligned(packed[-1].nbytes)
            for part, weight in packed[-1].sources:
                members |= {
                    entry.name: (entry, _as_stored(role, entry, part, weight)) for role, entry in weight.members.items()
                }
        sums: list[Sum] = []
        for name in (one for one in names if one in self.changes):
            products: list[tuple[str, str, float]] = []
            for number, change in enumerate(self.changes[name]):
                b, a = (replace(one, name=f"{one.name}:{number}") for one in (change.b, change.a))
                members |= {one.name: (one, (_whole(one),)) for one in (b, a)}
                products.append((b.name, a.name, change.scale))
            sums.append(Sum(name.removeprefix(prefix), tuple(products)))
        wanted += [(name, DTYPES[entry.dtype], entry.shape, parts) for name, (entry, parts) in members.items()]
        # In file order the pieces of a layer that is stored in one run are read with one call.
        wanted.sort(key=lambda item: min((part.entry.file, part.entry.offset) for part in item[3]))
        pieces: list[TensorPart] = []
        offset = 0
        for name, dtype, shape, parts in wanted:
            pieces.append(TensorPart(name, dtype, shape, offset, parts).placed(in_place))
            offset = pieces[-1].offset + pieces[-1].nbytes
        return Block(label, tuple(pieces), tuple(packed), sums=tuple(sums))

    def _by_expert(self, part: Part, shape: tuple[int, ...]) -> list[Part]:
        weight = self.folded.quantised.get(part.entry.name)
        fused = weight is not None and len(weight.shape) == 3 and not weight.is_stack
        return [part] if fused else part.by_expert(shape)

    def _sources(self, name: str, parts: Sequence[Part]) -> tuple[tuple[Part, Quantised], ...]:
        quantised = self.folded.quantised
        plain = [part.entry.name for part in parts if part.entry.name not in quantised]
        if plain:
            raise UnsupportedModel(
                f"'{name}' is made of quantised tensors and of '{plain[0]}', which is not quantised.",
                hint="a version of the model that quantises all of them or none.",
            )
        found = [(part, quantised[part.entry.name]) for part in parts]
        return tuple(
            (part, weight.alone(part.expert) if weight.is_stack and part.expert is not None else weight)
            for part, weight in found
        )


def _linears(skeleton: PreTrainedModel, layers: str) -> frozenset[str]:
    """The weights of the layers' linear modules."""
    named = skeleton.get_submodule(layers).named_modules(prefix=layers)
    return frozenset(f"{path}.weight" for path, module in named if isinstance(module, nn.Linear))


def _as_stored(role: str, entry: Entry, part: Part, weight: Quantised) -> tuple[Part, ...]:
    """Codes or scales as they are on disk, and whose they are: of a stack each expert has its own rows."""
    whole = _whole(entry)
    if weight.expert is None:
        return (replace(whole, expert=part.expert),)
    return tuple(whole.by_expert(entry.shape)) if role in STACKED else (whole,)


def _whole(entry: Entry) -> Part:
    return Part(entry, entry.name, torch.empty(entry.shape, device="meta").stride(), 0)


def _changes(folder: Folder, skeleton: Skeleton, stored: Collection[str]) -> dict[str, list[Change]]:
    """What adapters add to weights, by the names of the module, which may be others on disk.

    Raises UnsupportedModel for what is no stored matrix of the language model.
    """
    found: dict[str, list[Change]] = {}
    named = {one.name: Entry(one.name, one.b.file, 0, 0, "", one.shape) for one in folder.changes}
    own_name = skeleton.wrapper.own_name if skeleton.wrapper else str
    try:
        parts = route(named.values(), skeleton.whole, own_name)
    except BadModelDir:  # of one of them, which is named below
        parts = {}
    places = {part.entry.name: (name, part) for name, (part, *others) in parts.items() if not others}
    for one in folder.changes:
        if one.name not in places:
            try:
                parts = route([named[one.name]], skeleton.whole, own_name)
            except BadModelDir as problem:
                raise _misplaced(one, problem.what) from problem
            raise _misplaced(one, "It is part of a larger tensor, or of another part of the model.")
        name, part = places[one.name]
        if part.entry.shape != one.shape or part.offset or part.stride != (one.shape[1], 1):
            raise _misplaced(one, "The weight is kept turned round, or as a part of another.")
        if name not in stored:
            raise _misplaced(one, "It is not stored: it is tied to the embeddings, which would change with it.")
        found.setdefault(name, []).append(one)
    return found


def _misplaced(change: Change, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the adapter {change.origin} changes '{change.name}' {list(change.shape)}, which cannot be streamed.",
        why,
        "an adapter that was trained on this model; or merge it once by peft's merge_and_unload().",
    )


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
            raise UnsupportedModel(
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
