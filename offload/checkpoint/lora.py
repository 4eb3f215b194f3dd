"""LoRA adapters in peft's layout: which weights one changes and which it replaces. Reads headers; knows no torch.

A weight W [O, I] becomes W + s * (B @ A), added in float32 and rounded once, with A lora_A [r, I] and B lora_B [O, r].
s is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, times the scale that the adapter is asked with.
Sources: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA); peft's LoraConfig and its saved names.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from offload.checkpoint.contents import ADAPTER
from offload.checkpoint.documents import Json, read_json
from offload.checkpoint.entry import Change, Entry
from offload.checkpoint.headers import Folder, read_header
from offload.checkpoint.quantized.weight import FLOATS
from offload.checkpoint.roles import LAYER, part_of
from offload.errors import BadModelDir, CorruptShard, UnsupportedModel
from offload.machine.folders import typed_path

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGE = "merge it once: peft's merge_and_unload() and save_pretrained, and take that folder instead of --lora."
# Fields of the config that say how it was trained, or what is read here; any other one that is set is refused by name.
KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "loftq_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "init_lora_weights",
))  # fmt: skip
# Begun so, an adapter belongs to a base model that was changed before the training.
OTHER_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """One adapter's folder, checked down to its header."""

    path: Path
    changes: tuple[Change, ...]
    replaced: Mapping[str, Entry]
    """Whole weights in place of the model's own (modules_to_save), by the names of the model's."""
    size_B: int


def split(asked: str) -> tuple[Path, float]:
    """Folder and scale of `FOLDER[:scale]`. Raises BadModelDir."""
    folder, colon, scale = asked.rpartition(":")
    if not colon or typed_path(asked).is_dir():
        return typed_path(asked), 1.0
    try:
        number = float(scale)
    except ValueError:
        return typed_path(asked), 1.0  # it will be missed by its whole name
    if not math.isfinite(number):
        raise BadModelDir(f"--lora {asked}: the scale {scale} is no number to multiply with.", hint="FOLDER:0.5, say.")
    return typed_path(folder), number


def open_adapter(asked: str) -> Adapter:
    """The adapter `FOLDER[:scale]`; no weight is read.

    Raises BadModelDir for what is none, CorruptShard for damage, UnsupportedModel for what cannot be added, by name.
    """
    path, scale = split(asked)
    if not (path / ADAPTER).is_file():
        raise BadModelDir(
            f"{path} is no adapter: {ADAPTER} is not there.",
            hint="the folder that peft's save_pretrained wrote, on this machine.",
        )
    config = read_json(path / ADAPTER)
    _refuse_others(path, config)
    if not (path / WEIGHTS).is_file():
        raise BadModelDir(
            f"{path} holds no {WEIGHTS}.",
            "Adapters saved as pickle (adapter_model.bin) can run code when loaded, and are not read.",
            "save it again with peft, which writes safetensors.",
        )
    size_B, entries = read_header(path / WEIGHTS)
    halves: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Entry] = {}
    for name, entry in entries.items():
        own = name.removeprefix(PREFIX)
        if match := LORA.fullmatch(own):
            halves.setdefault(match["module"], {})[match["which"]] = entry
        elif own == name or "lora_" in own:
            raise UnsupportedModel(f"{path} holds '{name}', which is no LoRA of a linear layer.", None, MERGE)
        else:
            replaced[re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", own)] = entry
    changes = tuple(_change(path, config, module, pair, scale) for module, pair in halves.items())
    if not changes and not replaced:
        raise BadModelDir(f"{path / WEIGHTS} holds no tensors.", hint="save the adapter again.")
    return Adapter(path, changes, replaced, size_B)


def _refuse_others(path: Path, config: Mapping[str, Json]) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise UnsupportedModel(
            f"{path} is an adapter whose peft_type is {config.get('peft_type')}, not LoRA.", None, MERGE
        )
    for name, value in config.items():
        if name not in KNOWN and value not in (None, False, "", "none", 0) and value != [] and value != {}:
            raise UnsupportedModel(f"{path} was trained with {name} = {json.dumps(value)[:60]}.", None, MERGE)
    if config.get("bias", "none") != "none":
        raise UnsupportedModel(f"{path} changes biases too (bias = {config['bias']!r}).", None, MERGE)
    if isinstance(began := config.get("init_lora_weights"), str) and OTHER_BASE.search(began.lower()):
        raise UnsupportedModel(
            f"{path} was begun with init_lora_weights = {began!r}, which changed the base model.", None, MERGE
        )


def _change(path: Path, config: Mapping[str, Json], module: str, pair: Mapping[str, Entry], scale: float) -> Change:
    if len(pair) < 2:
        raise CorruptShard(f"{path / WEIGHTS} is damaged: of '{module}' lora_{'B' if 'A' in pair else 'A'} is missing.")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0] if a.shape else 0
    alpha = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    named = _for_module(config.get("rank_pattern"), module, config.get("r"))
    if not (len(a.shape) == len(b.shape) == 2 and b.shape[1] == rank > 0 and {a.dtype, b.dtype} <= {*FLOATS}):
        shapes = f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        raise UnsupportedModel(
            f"{path} changes '{module}' by {shapes}, which is no LoRA of a linear layer.", None, MERGE
        )
    if named != rank:
        raise CorruptShard(f"{path} is damaged: '{module}' has rank {rank}, {ADAPTER} says {named}.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CorruptShard(f"{path / ADAPTER} is damaged: lora_alpha is {alpha!r}.")
    own = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
    return Change(f"{module}.weight", a, b, own * scale)


def _for_module(patterns: Json, module: str, default: Json) -> Json:
    """What a pattern says of this module; peft takes the first that fits the end of its name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CorruptShard(f"{ADAPTER} is damaged: {pattern!r} is no pattern ({error}).") from error
    return default


def with_adapters(folder: Folder, asked: Iterable[str]) -> Folder:
    """The folder with the changes of these adapters, in their order. Raises what `open_adapter` raises."""
    found = tuple(map(open_adapter, asked))
    entries, sizes = dict(folder.entries), dict(folder.file_sizes)
    layers = {match[1] for name in entries if (match := LAYER.search(name))}
    for adapter in found:
        sizes[adapter.path / WEIGHTS] = adapter.size_B
        for change in adapter.changes:
            _check_changed(folder, layers, change)
        for name, entry in adapter.replaced.items():
            _check_replaced(folder, adapter, name, entry)
            entries[name] = replace(entry, name=name)
    return replace(
        folder, entries=entries, file_sizes=sizes, changes=tuple(one for adapter in found for one in adapter.changes)
    )


def _check_changed(folder: Folder, layers: Collection[str], change: Change) -> None:
    """What headers can tell; names that differ on disk are found when the layers are laid out."""
    stored, layer, why = folder.entries.get(change.name), LAYER.search(change.name), None
    if stored is not None and stored.dtype in FLOATS and stored.shape != change.shape:
        why = f"which the model has as {list(stored.shape)}"
    elif layer and layer[1] not in layers:
        why = f"of a layer that the model does not have (there are {len(layers)})"
    if why:
        raise UnsupportedModel(
            f"the adapter {change.origin} changes '{change.name}' {list(change.shape)}, {why}.",
            "It was trained on another model.",
            "an adapter that was trained on this model.",
        )


def _check_replaced(folder: Folder, adapter: Adapter, name: str, entry: Entry) -> None:
    stored = folder.entries.get(name)
    why = None
    if stored is None or stored.dtype not in FLOATS:
        why = "which the model does not store as a plain tensor of that name"
    elif stored.shape != entry.shape or entry.dtype not in FLOATS:
        why = f"which is {entry.dtype} {list(entry.shape)}, the model's own is {stored.dtype} {list(stored.shape)}"
    elif part_of(name) == "embeddings" and not any(part_of(other) == "head" for other in folder.entries):
        why = "which is the model's head as well"
    if why:
        raise UnsupportedModel(f"{adapter.path} replaces '{name}', {why}.", None, MERGE)
