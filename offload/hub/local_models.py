"""What a model folder here is, whether it is complete, and how to remove it. Reads headers; knows no torch."""

import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint.documents import CONFIG
from offload.checkpoint.entry import Entry
from offload.checkpoint.gguf.architectures import architecture_of
from offload.checkpoint.gguf.model import GgufModel, gguf_files, open_gguf
from offload.checkpoint.headers import Folder, open_folder
from offload.checkpoint.manifest import digest_of, read_manifest, verify
from offload.checkpoint.quantized.gguf import FLOAT_SCHEMES
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.quantized.weight import Quantised
from offload.checkpoint.roles import LAYER, part_of
from offload.errors import BadModelDir, CorruptShard
from offload.hub import hub

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Local:
    """A model folder in a few words."""

    path: Path
    architecture: str
    layers: int
    size_B: int
    format: str
    bits_per_weight: float
    pack: bool = False
    loads_in_transformers: bool = True
    head: str = "whole"
    notes: tuple[str, ...] = ()


def describe(path: Path) -> Local:
    """What the folder or GGUF file holds, from config.json and headers."""
    if files := gguf_files(path):
        return _of_gguf(path, open_gguf(files))
    folder = open_folder(path)
    manifest = read_manifest(path)
    return Local(
        path,
        folder.architecture,
        _layers(folder),
        sum(folder.file_sizes.values()),
        format_of(folder),
        bits_per_weight(folder),
        manifest is not None,
        (path / CONFIG).exists() and (manifest is None or bool(manifest.get("loads_in_transformers"))),
        next((weight.scheme for weight in fold(folder).quantised.values() if _is_head(weight.name)), "whole"),
        folder.notes,
    )


def _layers(folder: Folder) -> int:
    """As config.json counts them, or as its tensors are numbered where it calls them something else."""
    count = folder.config.get("num_hidden_layers")
    return count if isinstance(count, int) else len({match[1] for match in map(LAYER.search, folder.entries) if match})


def damaged_files(path: Path) -> list[str]:
    """Weight files whose bytes are not those that were published or packed; empty when all is well.

    Packs remember the hash of each shard, and the Hub's cache names its files by theirs. In other folders only sizes
    and headers can be checked.
    """
    folder = open_folder(path)
    if read_manifest(path) is not None:
        return verify(path)
    return [file.name for file in folder.file_sizes if _hashed(file) and digest_of(file).sha256 != file.resolve().name]


def check_bytes(path: Path) -> bool:
    """Raise CorruptShard unless every weight file has the bytes that were published or packed; was there a hash?"""
    if damaged := damaged_files(path):
        raise damaged_error(path, damaged)
    return hashed(path)


def damaged_error(path: Path, damaged: list[str]) -> CorruptShard:
    """What to say of damaged files."""
    many = f"{len(damaged)} files of {path} are" if len(damaged) > 1 else f"1 file of {path} is"
    return CorruptShard(
        f"{many} damaged: {', '.join(damaged[:3])}{' …' if len(damaged) > 3 else ''}.",
        "Their bytes are not those that were written.",
        "remove them, then the specexec pack or pull that made them (it keeps what is whole).",
    )


def hashed(path: Path) -> bool:
    """Whether `damaged_files` can decide by hash."""
    return read_manifest(path) is not None or all(_hashed(file) for file in open_folder(path).file_sizes)


def remove(path: Path) -> int:
    """Delete a pack, or a repository from the Hub's cache, with all its revisions; returns the bytes set free."""
    real = path.resolve()
    if read_manifest(path) is not None:
        size_B = sum(file.stat().st_size for file in real.iterdir())
        shutil.rmtree(real)
        return size_B
    cache = hub.cache_folder().resolve()
    if cache not in real.parents:
        raise BadModelDir(
            f"{path} is a folder of your own.", "Removed are packs and what was pulled from the Hub.", f"rm -r {path}"
        )
    # The cache has one folder for each repository; its snapshots are links into its blobs.
    repo = cache / real.relative_to(cache).parts[0]
    size_B = sum(file.stat().st_size for file in (repo / "blobs").glob("*"))
    shutil.rmtree(repo)
    return size_B


def _of_gguf(path: Path, model: GgufModel) -> Local:
    """The same of a GGUF file, whose documents are not written for that."""
    tensors = model.facts.tensors.values()
    largest = max(tensors, key=lambda tensor: tensor.nbytes).kind.name.lower()
    few = sorted({tensor.kind.name.lower() for tensor in tensors if tensor.kind.plain is None})
    return Local(
        path,
        architecture_of(model.facts).model_type,
        model.facts.layers,
        sum(header.size_B for header in model.headers),
        "+".join(few) or largest,
        _bits((math.prod(tensor.shape), tensor.nbytes) for tensor in tensors),
        loads_in_transformers=False,
    )


def format_of(folder: Folder) -> str:
    """What its layers are stored in, in a few words."""
    quantised = fold(folder).quantised.values()
    schemes = sorted({weight.scheme for weight in quantised if not _is_head(weight.name)})
    if few := [scheme for scheme in schemes if scheme not in FLOAT_SCHEMES] or schemes:
        return "+".join(few)
    return max(folder.entries.values(), key=lambda entry: entry.nbytes).dtype.lower()


def bits_per_weight(folder: Folder) -> float:
    """Of all tensors, scales included."""
    folded = fold(folder)
    weights: tuple[Entry | Quantised, ...] = (*folded.dense.values(), *folded.quantised.values())
    return _bits((math.prod(one.shape), one.nbytes) for one in weights)


def _bits(weights: Iterable[tuple[int, int]]) -> float:
    counts, sizes_B = zip(*weights, strict=True)
    return round(8 * sum(sizes_B) / max(sum(counts), 1), 2)


def _is_head(name: str) -> bool:
    return not LAYER.search(name) and part_of(name) == "head"


def _hashed(file: Path) -> bool:
    return file.is_symlink() and SHA256.fullmatch(file.resolve().name) is not None
