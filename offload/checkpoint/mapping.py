"""From names on disk to places in the module, by transformers' own conversion table. Reads no weight.

A checkpoint may store under other names, expert by expert, or fused what the module keeps as one tensor. Every tensor
on disk becomes one or more `Part`s: these bytes go to that (possibly strided) view of that parameter.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from offload.checkpoint.entry import Entry, Strides, placed
from offload.errors import BadModelDir, UnsupportedModel

log = logging.getLogger(__name__)

# Buffers that old checkpoints carry and no module reads; the model class adds its own list.
IGNORABLE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")
# Scales for keys and values in 8 bits. Ours stay whole, so that nothing needs them.
CACHE_SCALES = re.compile(r"\.(k|v|q|kv|prob)_(scale|zero_point)$")


@dataclass(frozen=True)
class Part:
    """The bytes of `entry` belong into `target`, at element `offset` with these strides."""

    entry: Entry
    target: str
    stride: tuple[int, ...]
    offset: int
    expert: int | None = None
    """Whose bytes they are, where a layer has experts that are fetched one by one."""

    def by_expert(self, shape: tuple[int, ...]) -> "list[Part]":
        """Cut where one expert of a target of this shape ends and the next one begins, if that can be done."""
        each = math.prod(shape[1:])
        if len(self.entry.shape) == len(shape) and self.stride[0] == each:
            return [
                replace(self, entry=self.entry.rows(index, 1), offset=self.offset + index * each, expert=index)
                for index in range(shape[0])
            ]
        first, last = self.offset // each, (self.offset + self.extent - 1) // each
        return [replace(self, expert=first)] if first == last else [self]

    @property
    def extent(self) -> int:
        """Elements of the target from its first to its last one."""
        return 1 + sum((length - 1) * step for length, step in zip(self.entry.shape, self.stride, strict=True))


def route(
    entries: Iterable[Entry], model: PreTrainedModel, own_name: Callable[[str], str | None] = str
) -> dict[str, list[Part]]:
    """For every tensor of the module its parts on disk; what fits nowhere or not exactly is refused.

    `own_name` says what a tensor of `model` is called by those who ask, and None of one they leave on disk.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parts: dict[str, list[Part]] = {}
    leftovers: list[str] = []
    for job in _jobs(entries, model, shapes):
        if any(target not in shapes for target in job.targets):
            leftovers.extend(entry.name for entry in job.entries)
            continue
        for part in job.parts(shapes):
            parts.setdefault(part.target, []).append(part)
    ignorable = re.compile("|".join([*IGNORABLE, *(model._keys_to_ignore_on_load_unexpected or ())]))
    scales = [name for name in leftovers if CACHE_SCALES.search(name)]
    _refuse_leftovers([name for name in leftovers if not ignorable.search(name) and name not in scales], model)
    if scales:
        log.warning("%d scales of an 8-bit cache are left out (%s …): ours stays whole", len(scales), scales[0])
    for target, found in parts.items():
        if sum(_elements(part.entry) for part in found) != shapes[target].numel():
            raise _misfit(found[0].entry, target, shapes[target])
    named = ((own_name(target), found) for target, found in parts.items())
    return {name: [replace(part, target=name) for part in found] for name, found in named if name is not None}


def _refuse_leftovers(names: Sequence[str], model: PreTrainedModel) -> None:
    if names:
        raise BadModelDir(
            f"the checkpoint holds {len(names)} tensors that {type(model).__name__} has no place for: "
            f"{', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}.",
            "config.json does not describe these weights (number of layers or architecture).",
            "download config.json and the weights from the same revision.",
        )


@dataclass
class Job:
    """One conversion: the tensors that go in (in natural order, by source pattern) and the names that come out."""

    operations: Sequence[ConversionOps]
    sources: dict[str, list[Entry]]
    targets: list[str]
    config: PreTrainedConfig
    place: Strides | None = None
    """Where the one tensor that goes in lies in the one that comes out."""

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.sources.values() for entry in group]

    def parts(self, shapes: Mapping[str, torch.Size]) -> Iterator[Part]:
        """Where every byte of the sources goes; the chains below are all that decoder-only models use."""
        first = self.entries[0]
        views = [torch.empty(shapes[target], device="meta") for target in self.targets]
        if self.place:
            yield _in_place(first, self.targets[0], views[0], self.place)
            return
        match list(self.operations):
            case []:
                yield _part(first, self.targets[0], views[0])
            case [Transpose() as op]:
                same = op.check_dims and first.shape == tuple(views[0].shape)
                yield _part(first, self.targets[0], views[0] if same else views[0].transpose(op.dim0, op.dim1))
            case [op] if _splits_rows(op) and len(self.entries) == 1:
                yield from self._split(first, views)
            case [op, pairs] if _splits_rows(op) and _turns_pairs(pairs) and len(self.entries) == 1:
                for part, view in zip(self._split(first, views), views, strict=True):
                    yield self._paired(part, view, pairs)
            case [pairs] if _turns_pairs(pairs) and len(self.entries) == 1:
                yield self._paired(_part(first, self.targets[0], views[0]), views[0], pairs)
            case [op] if _alternates(op) and len(self.entries) == 1:
                yield from self._alternating(first, views[0], op)
            case [Concatenate() as op]:
                yield from self._concatenate(views[0], op.dim)
            case [MergeModulelist() as op] if len(self.sources) == 1:
                yield from self._stack(self.entries, views[0], op.dim)
            case [MergeModulelist() as stack, Concatenate() as join] if stack.dim == 0 and join.dim >= 1:
                start = 0
                for group in self.sources.values():
                    length = group[0].shape[join.dim - 1] if len(group[0].shape) >= join.dim else 0
                    view = _narrow(views[0], join.dim, start, length, group[0], self.targets[0])
                    yield from self._stack(group, view, stack.dim)
                    start += length
            case [op] if _parts_experts(op):
                yield from self._part_experts(views, op)
            case unknown:
                raise UnsupportedModel(
                    f"'{first.name}' needs the conversion {unknown}, which streaming cannot do yet.",
                    hint="save the model once with transformers' save_pretrained in its module layout.",
                )

    def _split(self, entry: Entry, views: list[torch.Tensor]) -> Iterator[Part]:
        if not entry.shape or sum(view.shape[0] for view in views) != entry.shape[0]:
            raise _misfit(entry, self.targets[0], views[0].shape)
        start = 0
        for target, view in zip(self.targets, views, strict=True):
            yield _part(entry.rows(start, view.shape[0]), target, view)
            start += view.shape[0]

    def _paired(self, part: Part, view: torch.Tensor, pairs: Any) -> Part:
        """Rows of a head that turn together are neighbours on one side, and half a head apart on the other."""
        names: list[str] | None = pairs.permute_layer_names
        if names is not None and not any(name in part.target for name in names):
            return part
        config = getattr(self.config, pairs.subconfig_key or "", self.config)
        heads, (rows, *rest) = getattr(config, "num_attention_heads", 1), view.shape
        if rows % (2 * heads):
            raise _misfit(part.entry, part.target, view.shape)
        half = rows // heads // 2
        there, here = ((2, half), (half, 2)) if pairs.inverse else ((half, 2), (2, half))
        turned = view.unflatten(0, (heads, *here)).transpose(1, 2)
        return _part(replace(part.entry, shape=(heads, *there, *rest)), part.target, turned)

    def _alternating(self, entry: Entry, view: torch.Tensor, op: Any) -> Iterator[Part]:
        """Rows of two halves that alternate on one side and follow one another on the other; each expert by itself."""
        dim, length = op.dim, view.shape[op.dim]
        if tuple(view.shape) != entry.shape or length % 2:
            raise _misfit(entry, self.targets[0], view.shape)
        there, here = ((2, length // 2), (length // 2, 2)) if op.inverse else ((length // 2, 2), (2, length // 2))
        turned = view.unflatten(dim, here).transpose(dim, dim + 1)
        if dim == 0:
            yield _part(replace(entry, shape=(*there, *entry.shape[1:])), self.targets[0], turned)
            return
        shape = (1, *entry.shape[1:dim], *there, *entry.shape[dim + 1 :])
        for index in range(entry.shape[0]):
            yield _part(replace(entry.rows(index, 1), shape=shape), self.targets[0], turned[index : index + 1])

    def _concatenate(self, view: torch.Tensor, dim: int) -> Iterator[Part]:
        start = 0
        for entry in self.entries:
            length = entry.shape[dim] if len(entry.shape) > dim else 0
            yield _part(entry, self.targets[0], _narrow(view, dim, start, length, entry, self.targets[0]))
            start += length

    def _stack(self, group: list[Entry], view: torch.Tensor, dim: int) -> Iterator[Part]:
        self._refuse_missing_experts(group, view.shape[dim])
        for index, entry in enumerate(group):
            yield _part(entry, self.targets[0], view.select(dim, index))

    def _part_experts(self, views: list[torch.Tensor], op: Any) -> Iterator[Part]:
        """Experts of text and of images in one list: each target is a stack of its own (Ernie 4.5 VL)."""
        starts = [0] * len(views)
        for group in self.sources.values():
            self._refuse_missing_experts(group, sum(len(view) for view in views))
            experts = iter(group)
            for number, (target, view) in enumerate(zip(self.targets, views, strict=True)):
                own = [next(experts) for _ in range(len(view))]
                length = own[0].shape[op.concat_dim - 1] if len(own[0].shape) >= op.concat_dim else 0
                here = _narrow(view, op.concat_dim, starts[number], length, own[0], target)
                starts[number] += length
                for index, entry in enumerate(own):
                    yield _part(entry, target, here[index])

    def _refuse_missing_experts(self, group: list[Entry], count: int) -> None:
        # A missing expert would shift all later ones: the numbers in the names must be 0, 1, 2 …
        numbers = [_numbers(entry.name) for entry in group]
        counting = any({row[column] for row in numbers} == set(range(len(group))) for column in range(len(numbers[0])))
        if len(group) != count or not counting:
            raise BadModelDir(
                f"'{self.targets[0]}' is made of {count} experts, the checkpoint holds {len(group)} "
                f"('{group[0].name}' …).",
                "Some experts are missing, or config.json belongs to another model.",
                "download the model again.",
            )


def _jobs(entries: Iterable[Entry], model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> Iterator[Job]:
    transforms = get_model_conversion_mapping(model)
    renamings = [step for step in transforms if isinstance(step, WeightRenaming)]
    converters = [step for step in transforms if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    prefix, known = model.base_model_prefix, dict(shapes)
    collected: dict[str, Job] = {}
    for entry in sorted(entries, key=lambda entry: _natural(entry.name)):
        name, place = placed(entry.name)
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if place:
            yield Job([], {"": [entry]}, [target], model.config, place)
            continue
        if target not in shapes and entry.name in shapes:
            target, pattern = entry.name, None
        if pattern is None:
            job = Job([], {"": []}, [target], model.config)
        else:
            step = by_pattern[pattern]
            targets = [target.replace(step.target_patterns[0], name) for name in step.target_patterns]
            job = Job(step.operations, {name: [] for name in step.source_patterns}, targets, model.config)
        group = collected.setdefault(target, job).sources.get(pattern or "")
        if group is None or (group and pattern is None):
            raise BadModelDir(f"'{entry.name}' and '{collected[target].entries[0].name}' are both '{target}'.")
        group.append(entry)
    for job in collected.values():
        # Patterns are alternatives as well as ingredients: those that matched nothing are not part of this job.
        job.sources = {pattern: group for pattern, group in job.sources.items() if group}
        yield job


# By name: these are younger than the oldest transformers we run with.
def _turns_pairs(op: ConversionOps) -> bool:
    return type(op).__name__ == "PermuteForRope"


def _alternates(op: ConversionOps) -> bool:
    return type(op).__name__ == "Interleave"


def _parts_experts(op: ConversionOps) -> bool:
    return type(op).__name__ == "ErnieFuseAndSplitTextVisionExperts" and getattr(op, "stack_dim", None) == 0


def _splits_rows(op: ConversionOps) -> bool:
    return type(op).__name__ in ("Chunk", "Split") and getattr(op, "dim", None) == 0


def _part(entry: Entry, target: str, view: torch.Tensor) -> Part:
    if tuple(view.shape) != entry.shape:
        raise _misfit(entry, target, view.shape)
    return Part(entry, target, view.stride(), int(view.storage_offset()))


def _in_place(entry: Entry, target: str, view: torch.Tensor, place: Strides) -> Part:
    if place.items != _elements(entry) or not place.fits(view.numel()):
        raise _misfit(entry, target, view.shape)
    return Part(replace(entry, shape=place.sizes), target, place.steps, place.offset)


def _narrow(view: torch.Tensor, dim: int, start: int, length: int, entry: Entry, target: str) -> torch.Tensor:
    if dim >= view.dim() or start + length > view.shape[dim]:
        raise _misfit(entry, target, view.shape)
    return view.narrow(dim, start, length)


def _misfit(entry: Entry, target: str, shape: torch.Size) -> BadModelDir:
    return BadModelDir(
        f"'{entry.name}' has the shape {list(entry.shape)}, which does not fit '{target}' {list(shape)}.",
        "config.json does not describe these weights.",
        "download config.json and the weights from the same revision.",
    )


def _elements(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
