"""Packs: a checkpoint rewritten for streaming, one aligned shard per layer, quantised on the way if asked.

`plan` decides with headers alone what goes where; `pack` writes shard after shard. Each finished shard is in the
manifest with its hash, so that a pack that was killed goes on where it stopped. The originals are only read.
docs/packs.md describes the format.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from offload.checkpoint.block import Block
from offload.checkpoint.contents import ADAPTER, INDEX, MANIFEST
from offload.checkpoint.documents import CONFIG, Json
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_header
from offload.checkpoint.layout import lay_out
from offload.checkpoint.manifest import (
    FORMAT,
    PARTIAL,
    Advance,
    FinishedFile,
    digest_of,
    lock,
    read_manifest,
    still_true,
)
from offload.checkpoint.mtp import OWN_HEAD, PROJECTION, mtp_names
from offload.checkpoint.quantized import int4
from offload.checkpoint.quantized.formats import foreign
from offload.checkpoint.quantized.gguf import FLOAT_SCHEMES
from offload.checkpoint.quantized.quantize import BLOCK, CONFIGS, NESTED_BLOCK, STATE_B, Quant, quantise
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.skeleton import Skeleton, build
from offload.checkpoint.tensors import DTYPES, load_entry
from offload.errors import DiskFull, OutputExists, ReadFailed, UnsupportedModel
from offload.machine.file_identity import stamps
from offload.model.mtp_layer import plan_mtp_layer
from offload.model.quantized_head import head_on_disk, stored_as
from offload.packs.writer import write, write_failed, write_small
from offload.placement.quantized_sizes import FourBits
from offload.units import size

VERSION = 1
REST = "rest.safetensors"
# What belongs to images and sound: nothing here reads it, but the pack is the whole model.
BESIDE = "beside.safetensors"
# Layers that guess further ahead: no layer of the model itself.
MTP = "mtp.safetensors"
FLOATS = {"F32", "F16", "BF16"}
# What a folder has besides weights: tokenizer, chat template, settings.
COPIED = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Shard:
    """One file to write: which tensors of the original, and which of them in few bits."""

    file: str
    entries: tuple[Entry, ...]
    quantised: frozenset[str] = frozenset()
    head: tuple[str, str] | None = None
    """Which of them becomes a head in four bits, and by what name; under another than its own it is kept as well."""


@dataclass(frozen=True)
class PackPlan:
    """A whole pack, decided before anything is written."""

    folder: Folder
    quant: Quant
    shards: tuple[Shard, ...]
    skipped: tuple[str, ...]
    """Linear modules that stay dense, as transformers wants them named."""
    loadable: bool
    """Can plain transformers load it? Not where experts are quantised in a layout of ours."""
    code: bool = False
    """Does the Python that the folder brings travel along?"""
    head: FourBits = "none"
    """The format of the head."""

    @property
    def read_B(self) -> int:
        """Bytes of the originals."""
        return sum(entry.nbytes for shard in self.shards for entry in shard.entries)

    @property
    def size_B(self) -> int:
        """Bytes of the pack, within a few pages."""
        return sum(shard_B(shard, self.quant) for shard in self.shards)


class Originals(Protocol):
    """Originals that do not all lie in the folder that was planned with."""

    @property
    def commit(self) -> str:
        """Which revision they are of."""
        ...

    def load(self, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        """One tensor of them."""


def plan(folder: Folder, quant: Quant, trust_remote_code: bool = False, head: FourBits = "none") -> PackPlan:
    """What a pack of the folder holds; every tensor that the model needs is accounted for. Reads no weight."""
    stored = fold(folder).quantised.values()
    if quant != "none" and stored:
        floats = all(weight.scheme in FLOAT_SCHEMES for weight in stored)
        raise UnsupportedModel(
            f"{folder.called} {'holds rows in an order of its own' if floats else 'is quantised already'}.",
            None if floats else "Quantising twice would lose more than it saves.",
            "--quant none, which only lays it out for streaming, or the 16-bit safetensors version of the model.",
        )
    skeleton = build(folder, None, trust_remote_code)
    checkpoint = lay_out(folder, skeleton)
    shards: list[Shard] = []
    before = folder.config.get("quantization_config")
    loadable = not isinstance(before, dict) or before.get("quant_method") != "specexec"
    loadable = loadable and foreign([*(weight.scheme for weight in stored), quant]) is None
    for index, block in enumerate(checkpoint.layers):
        linear, stacked = _quantisable(block, skeleton, index, quant)
        loadable = loadable and not stacked
        shards.append(Shard(f"layer-{index:05d}.safetensors", _entries([block], folder), linear | stacked))
    few = None if head == "none" else stored_as(checkpoint, skeleton.model)
    shards.append(Shard(REST, _entries(checkpoint.rest, folder), head=few))
    if folder.mtp:
        shards.append(Shard(MTP, tuple(folder.mtp.values()), _quantisable_mtp(folder, quant, trust_remote_code)))
    if folder.beside:
        shards.append(Shard(BESIDE, tuple(folder.beside.values())))
    whole, layers = skeleton.whole, skeleton.whole_layers
    names = {name for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    skipped = sorted(name for name in names if not name.startswith(f"{layers}."))
    loadable = loadable and few is None
    return PackPlan(folder, quant, tuple(shards), tuple(skipped), loadable, trust_remote_code, head)


def pack(
    plan: PackPlan,
    out: Path,
    device: str = "cpu",
    advance: Advance = lambda nbytes: None,
    originals: Originals | None = None,
) -> None:
    """Write the pack into `out`, or finish one that was begun there. `advance` is called with bytes of the original.

    `originals` hands them out one by one where the plan was made without their files.
    """
    _refuse_overlap(plan, out)
    with _alone(out):
        manifest = _begin(plan, out)
        done = still_true(manifest, _originals(plan, originals))
        missing_B = sum(shard_B(shard, plan.quant) for shard in plan.shards if shard.file not in done)
        free_B = shutil.disk_usage(out).free
        if missing_B > free_B:
            raise DiskFull(
                f"packing needs {size(missing_B)} more on the disk of {out}, {size(free_B)} are free.",
                f"{len(done)} of {len(plan.shards)} shards are written." if done else None,
                f"--out on another disk{', or --quant nf4' if plan.quant in ('none', 'int8') else ''}.",
            )
        for shard in plan.shards:
            file = out / shard.file
            if shard.file not in done or not file.is_file() or digest_of(file) != done[shard.file]:
                done[shard.file] = write(
                    file, [_content(shard, entry, plan.quant, device, originals) for entry in shard.entries]
                )
                _refuse_change(plan, manifest, originals)
                _save(out, manifest, done)
            advance(sum(entry.nbytes for entry in shard.entries))
        _finish(plan, out, manifest, done)


def shard_B(shard: Shard, quant: Quant) -> int:
    """Bytes of a shard, header included, within a page."""
    total = 4096
    for entry in shard.entries:
        count = math.prod(entry.shape)
        if shard.head and shard.head[0] == entry.name:
            total += -(-count // 2) + 4 * -(-count // BLOCK) + 64 + STATE_B
            total += entry.nbytes if shard.head[1] != entry.name else 0
        elif entry.name not in shard.quantised:
            total += entry.nbytes
        elif quant == "int8":
            total += count + 4 * (count // entry.shape[-1])
        elif quant == "int4":
            total += int4.size_B(entry.shape)
        else:
            matrices = entry.shape[0] if len(entry.shape) == 3 else 1
            blocks = -(-count // matrices // BLOCK)
            total += matrices * (-(-count // matrices // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK))
            total += 64 + 1024 + STATE_B * (1 + matrices // 8)
    return total


def _entries(blocks: Sequence[Block], folder: Folder) -> tuple[Entry, ...]:
    """The original tensors of the blocks, whole and each once: one may be cut up among several of the module's."""
    names = dict.fromkeys(part.entry.name for block in blocks for piece in block.pieces for part in piece.parts)
    return tuple(folder.entries[name] for name in names)


def _quantisable_mtp(folder: Folder, quant: Quant, trust_remote_code: bool) -> frozenset[str]:
    """The same of layers that guess further ahead, if known; what joins their inputs, and a head, stay whole."""
    names = mtp_names(folder)
    if quant == "none" or not names:
        return frozenset()
    laid_out = plan_mtp_layer(folder, None, trust_remote_code)
    small = frozenset[str]().union(
        *(
            names
            for block, number in zip(laid_out.checkpoint.layers, laid_out.numbers, strict=True)
            for names in _quantisable(block, laid_out.skeleton, number, quant)
        )
    )
    whole = (f".{PROJECTION}.", f".{OWN_HEAD}.")
    return frozenset(old for old, new in names.items() if new in small and not any(part in new for part in whole))


def _quantisable(block: Block, skeleton: Skeleton, index: int, quant: Quant) -> tuple[frozenset[str], frozenset[str]]:
    """Names on disk of the layer's linear weights, and of its experts. Routers, norms, filters and biases stay."""
    if quant == "none":
        return frozenset(), frozenset()
    layer = skeleton.layer_list[index]
    linear: set[str] = set()
    experts: set[str] = set()
    for piece in block.pieces:
        path, _, key = piece.name.rpartition(".")
        entries = [part.entry for part in piece.parts if part.entry.dtype in FLOATS]
        names = {entry.name for entry in entries if quant != "int4" or int4.fits(entry.shape)}
        module = layer.get_submodule(path)
        if isinstance(module, nn.Linear) and key == "weight":
            linear |= names
        elif len(piece.shape) == 3 and not isinstance(module, nn.Conv1d):
            experts |= names
    return frozenset(linear), frozenset(experts)


def _content(
    shard: Shard, entry: Entry, quant: Quant, device: str, originals: Originals | None
) -> Entry | Mapping[str, torch.Tensor]:
    head = shard.head[1] if shard.head and shard.head[0] == entry.name else None
    if originals is None and entry.name not in shard.quantised and head is None:
        return entry
    load = originals.load if originals else load_entry
    weight = load(entry, DTYPES[entry.dtype])
    if head is not None:
        few = head_on_disk(weight.to(device), head)
        return few if head == entry.name else {entry.name: weight, **few}
    if entry.name not in shard.quantised:
        return {entry.name: weight}
    return quantise(weight.to(device), entry.name, quant)


def _refuse_overlap(plan: PackPlan, out: Path) -> None:
    if out.resolve() == plan.folder.path.resolve():
        raise OutputExists(f"{out} holds the originals, which are never touched.", hint="another --out.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder made and locked, so that two packs never write into it at once."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = lock(out)
    except OSError as error:
        raise write_failed(out, error) from error
    if folder is None:
        raise OutputExists(f"another specexec is writing to {out}.", hint="wait for it, or another --out.")
    try:
        yield
    finally:
        os.close(folder)


def _refuse_change(plan: PackPlan, manifest: Mapping[str, Json], originals: Originals | None) -> None:
    if manifest["originals"] != _originals(plan, originals):
        raise ReadFailed(
            f"the weights in {plan.folder.path} were written to while they were packed.",
            "Old and new weights must not mix.",
            "the same command again, which begins anew.",
        )


def _originals(plan: PackPlan, originals: Originals | None) -> dict[str, Json]:
    """Which files a pack is made from, to the byte: a commit, or what the system says of each."""
    if originals is not None:
        return {"commit": originals.commit}
    return {name: [*stamp] for name, stamp in stamps([*plan.folder.file_sizes]).items()}


def _begin(plan: PackPlan, out: Path) -> dict[str, Json]:
    """A new manifest, or the one of the same pack that was begun here."""
    new: dict[str, Json] = {
        "format": FORMAT,
        "version": VERSION,
        "quant": plan.quant,
        "head_quant": plan.head,
        "loads_in_transformers": plan.loadable,
        "source": _fingerprint(plan.folder),
        "complete": False,
        "shards": {},
    }
    old = read_manifest(out)
    if old is None:
        if strangers := sorted(file.name for file in out.iterdir() if file.suffix != PARTIAL):
            raise OutputExists(f"{out} is not empty ({strangers[0]} …).", hint="another --out, or an empty folder.")
        return new
    same = ("version", "quant", "source")
    head = old.get("head_quant", "none")
    if [old.get(key) for key in same] != [new[key] for key in same] or head != plan.head:
        raise OutputExists(
            f"{out} holds a pack of another model, another revision or with --quant {old.get('quant')} "
            f"--head-quant {head}.",
            hint="another --out, or remove that pack first.",
        )
    return old


def _fingerprint(folder: Folder) -> str:
    """Changes whenever a header, a size or the config of the originals does."""
    tensors = sorted(
        (e.name, e.dtype, e.shape, e.offset, e.file.name) for e in (*folder.entries.values(), *folder.mtp.values())
    )
    sizes = sorted((file.name, size_B) for file, size_B in folder.file_sizes.items())
    return hashlib.sha256(json.dumps([folder.whole_config, tensors, sizes], sort_keys=True).encode()).hexdigest()


def _save(out: Path, manifest: dict[str, Json], done: Mapping[str, FinishedFile]) -> None:
    manifest["shards"] = {name: {"size": wrote.size_B, "sha256": wrote.sha256} for name, wrote in sorted(done.items())}
    write_small(out / MANIFEST, _json(manifest))


def _finish(plan: PackPlan, out: Path, manifest: dict[str, Json], done: Mapping[str, FinishedFile]) -> None:
    """Index, tokenizer and settings; config.json last, because no library takes a folder without it for a model."""
    placed = {name: shard.file for shard in plan.shards for name in read_header(out / shard.file)[1]}
    index = {"metadata": {"total_size": sum(wrote.size_B for wrote in done.values())}, "weight_map": placed}
    write_small(out / INDEX, _json(index))
    for file in sorted(plan.folder.path.iterdir()):
        if _travels(file, plan.code):
            write_small(out / file.name, file.read_bytes())
    manifest["complete"] = True
    _save(out, manifest, done)
    config = dict(plan.folder.whole_config)
    if plan.head != "none":
        config["tie_word_embeddings"] = False  # it has a copy of its own
        if isinstance(text := config.get("text_config"), dict):
            config["text_config"] = {**text, "tie_word_embeddings": False}
    if plan.quant != "none" or plan.head != "none":
        config["quantization_config"] = (
            {**CONFIGS[plan.quant], "llm_int8_skip_modules": list(plan.skipped)}
            if plan.loadable
            else {"quant_method": "specexec", "quant": plan.quant, "head_quant": plan.head, **_before(config)}
        )
    write_small(out / "config.json", _json(config))


def _before(config: Mapping[str, Json]) -> dict[str, Json]:
    """What was said of weights in few bits that are kept as they are."""
    before = config.get("quantization_config")
    if isinstance(before, dict) and before.get("quant_method") == "specexec":
        before = before.get("layers")
    return {"layers": before} if before else {}


def _travels(file: Path, code: bool) -> bool:
    own = file.name in (MANIFEST, ADAPTER, CONFIG) or file.name.startswith((".", "model.safetensors.index."))
    suffixes = (*COPIED, ".py") if code else COPIED
    return file.is_file() and not own and (file.suffix in suffixes or file.name.startswith(("LICENSE", "NOTICE")))


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
