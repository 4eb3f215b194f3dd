"""Which bytes of which file hold each tensor of a checkpoint folder. Knows no torch; checks every file.

Everything comes from config.json, the index and the safetensors headers; nothing is read that was not checked first.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard, cast

from offload.checkpoint.contents import (
    ADAPTER,
    GGUF_NOTE,
    MANIFEST,
    MODELOPT,
    PICKLES,
    find_pickled,
    find_weights,
    instead,
)
from offload.checkpoint.documents import AGAIN, CONFIG, Json, read_json
from offload.checkpoint.entry import Change, Entry
from offload.checkpoint.gguf.consolidated import renamed
from offload.checkpoint.gguf.header import MAGIC
from offload.checkpoint.gguf.model import documents_folder, is_gguf, open_gguf, source_files
from offload.checkpoint.mtp import mtp_tensors
from offload.checkpoint.pickled.tensors import read_pickled
from offload.checkpoint.shared import with_shared, with_turns
from offload.checkpoint.wrapped import is_wrapper, text_settings, text_tensors
from offload.errors import BadModelDir, CorruptShard, ReadFailed, UnsupportedModel
from offload.units import size

# The safetensors library refuses larger headers too; a 70B header is about 100 KB.
MAX_HEADER_B = 100_000_000
MAX_SMALL_B = 1 << 20
MOST_LAYERS = 10_000  # published models have some hundreds at most
LFS = b"version "
# Tensors that change their dtype are read so much at a time: large enough for the disk, small enough to forget.
SCRATCH_B = 16 << 20
PLAIN = ("F64", "F32", "F16", "BF16")
SCALES = re.compile(r"(scales?|scale_inv|zeros|zero_point|SCB|absmax|qweight|g_idx|weight_packed)$")
STRAY = re.compile(
    r"(?P<module>.+)\.((weight|input|output|activation|per_tensor)_(global_)?scale(_inv|_2)?|weight_zero_point|SCB)"
)
ITEM_B = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A checked model folder: its config and where every tensor lies. Of a wrapper both are the language model's."""

    path: Path
    config: dict[str, Json]
    entries: dict[str, Entry]
    file_sizes: dict[Path, int]
    notes: tuple[str, ...] = ()
    """What is unusual about it and was settled, in words."""
    here: bool = True
    """Whether its files are on this machine; of others only the headers are known."""
    wrapper: dict[str, Json] | None = None
    """The whole config.json of a model that sees or hears as well."""
    beside: dict[str, Entry] = field(default_factory=dict)
    """Tensors that belong to images or sound: nothing here computes with them."""
    mtp: dict[str, Entry] = field(default_factory=dict)
    """Tensors of layers that guess further ahead (mtp.py): only a drafter computes with them."""
    changes: tuple[Change, ...] = ()
    """What adapters (lora.py) add to its weights."""

    @property
    def whole_config(self) -> dict[str, Json]:
        """config.json as it stands there."""
        return self.wrapper or self.config

    @property
    def architecture(self) -> str:
        """The name in config.json of all that the folder holds."""
        return str(self.whole_config.get("model_type", "unknown"))

    @property
    def weights_at(self) -> Path:
        """A path on the disk that weights are read from."""
        return next(iter(self.file_sizes), self.path) if self.here else self.path

    @property
    def called(self) -> Path:
        """What people call it by: its folder, or the GGUF file that the folder's documents are from."""
        return self.weights_at if (self.path / GGUF_NOTE).exists() else self.path

    @property
    def model_type(self) -> str:
        """The name in config.json of the language model's architecture."""
        return str(self.config.get("model_type", "unknown"))


def open_folder(path: Path) -> Folder:
    """Check a model folder, or a GGUF file, down to every header; no weight is read.

    Raises BadModelDir, CorruptShard, UnsupportedModel.
    """
    path = documents_folder(path)
    config, names = _config_in(path), _names_in(path)
    if GGUF_NOTE in names:
        return _open_gguf(path, config)
    weights = find_weights(names) or find_pickled(names)
    if weights is None:
        raise _no_model(path, names)
    wanted = read_index(path / weights.index) if weights.index else None
    files = sorted(set(wanted.values())) if wanted else weights.files
    entries: dict[str, Entry] = {}
    sizes: dict[Path, int] = {}
    for name in files:
        file = _inside(path, name)
        size_B, held = read_header(file)
        sizes[file] = size_B
        if wanted is None:
            entries.update(held)
            continue
        # The index decides: a tensor that a shard holds but the index does not name is not part of the model.
        for tensor in (key for key, value in wanted.items() if value == name):
            if tensor not in held:
                raise CorruptShard(
                    f"{name} lacks the tensor '{tensor}' that {weights.index} places there.",
                    "Index and shards come from different downloads, or one of them was edited.",
                    "download the model again.",
                )
            entries[tensor] = held[tensor]
    if not entries:
        raise no_tensors(str(path / files[0]))
    notes = [weights.note] if weights.note else []
    if ADAPTER in names:
        notes.append(f"the adapter beside the weights ({ADAPTER}) is not applied; --lora {path} adds it")
    return checked(Folder(path, config, entries, sizes, tuple(notes)))


def checked(folder: Folder) -> Folder:
    """The folder with its quantisation named, of a wrapper the language model alone; what guesses further is apart."""
    text = text_settings(folder.config) if is_wrapper(folder.config) else None
    mtp = mtp_tensors(text or folder.config, folder.entries)
    if mtp:
        folder = replace(
            folder, mtp=mtp, entries={name: one for name, one in folder.entries.items() if name not in mtp}
        )
    if text and (held := text_tensors(folder.entries)):
        beside = {name: entry for name, entry in folder.entries.items() if name not in held}
        note = f"{size(sum(one.nbytes for one in beside.values()))} for images and sound stay on disk"
        folder = replace(
            folder, config=text, entries=held, notes=(*folder.notes, note), wrapper=folder.config, beside=beside
        )
    folder = replace(folder, config=with_turns(folder.config), entries=with_shared(folder.config, folder.entries))
    config, plain = settled(folder.config, folder.entries)
    notes = (*folder.notes, plain) if plain else folder.notes
    if strays := {} if config.get("quantization_config") else _strays(folder.entries):
        kept = {name: entry for name, entry in folder.entries.items() if name not in strays}
        note = f"{len(strays)} scales beside whole weights are left out, such as {next(iter(strays))}"
        return replace(folder, config=config, entries=kept, notes=(*notes, note))
    return replace(folder, config=config, notes=notes)


def _strays(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Scales that quantising left behind, beside weights that are whole: transformers leaves them unread too."""
    whole = {name.removesuffix(".weight") for name, entry in entries.items() if entry.dtype in PLAIN}
    return {
        name: entry for name, entry in entries.items() if (found := STRAY.fullmatch(name)) and found["module"] in whole
    }


def _open_gguf(path: Path, config: dict[str, Json]) -> Folder:
    """A folder of documents with the tensors of the files that they were made from."""
    files = source_files(path)
    if not is_gguf(files[0]):
        read = {file: read_header(file) for file in files}
        held = {name: entry for _, entries in read.values() for name, entry in entries.items()}
        entries = {entry.name: entry for entry in renamed(held, config)}
        return Folder(path, config, entries, {file: size_B for file, (size_B, _) in read.items()})
    model = open_gguf(files)
    entries = {tensor.name: tensor for tensor in model.tensors()}
    return Folder(path, config, entries, {header.file: header.size_B for header in model.headers})


def read_config(path: Path) -> dict[str, Json]:
    """The folder's config.json, with what ModelOpt keeps beside it; says what is there instead of a model."""
    return _config_in(documents_folder(path))


def _config_in(path: Path) -> dict[str, Json]:
    if not path.is_dir():
        raise BadModelDir(f"{path} is not a folder.", hint="the folder that holds config.json.")
    names = _names_in(path)
    if CONFIG not in names:
        if MANIFEST in names:
            raise BadModelDir(
                f"{path} is a pack that is not finished.", hint="the specexec pack or pull that began it."
            )
        raise _no_model(path, names)
    config = read_json(path / CONFIG)
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise BadModelDir(f"{path / CONFIG} does not describe a usable model.", f"num_hidden_layers is {layers}.")
    return with_modelopt(config, read_json(path / MODELOPT)) if MODELOPT in names else config


def with_modelopt(config: dict[str, Json], own_file: dict[str, Json]) -> dict[str, Json]:
    """A config that names the method of ModelOpt, whose checkpoints may say so in a file of their own only."""
    quantization = own_file.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    if config.get("quantization_config") or not algorithm:
        return config
    assert isinstance(quantization, dict)
    return {**config, "quantization_config": {**quantization, "quant_method": "modelopt"}}


def settled(config: dict[str, Json], entries: Mapping[str, Entry]) -> tuple[dict[str, Json], str | None]:
    """The config with a quantisation that it means and names, and what had to be settled, in words.

    bitsandbytes may be meant by its switches alone; settings without a method over plain weights mean nothing.
    """
    asked = config.get("quantization_config")
    of_mlx = config.get("quantization")
    if isinstance(of_mlx, dict) and not (isinstance(asked, dict) and "quant_method" in asked):
        return {**config, "quantization_config": {**of_mlx, "quant_method": "MLX"}}, None
    if not isinstance(asked, dict) or not asked or "quant_method" in asked:
        return config, None
    if asked.get("load_in_4bit") or asked.get("load_in_8bit"):
        return {**config, "quantization_config": {**asked, "quant_method": "bitsandbytes"}}, None
    if any(entry.dtype not in PLAIN or SCALES.search(entry.name) for entry in entries.values()):
        return config, None
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    return plain, "config.json has a quantization_config that names no method; the weights are plain, so it is left out"


def no_tensors(file: str) -> BadModelDir:
    """What to say of weights that hold nothing."""
    return BadModelDir(f"{file} holds no tensors.", "It was saved without its weights.", "download the model again.")


def _names_in(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.suffix in (".json", ".safetensors") or not file.is_dir())


def _no_model(path: Path, names: list[str]) -> BadModelDir:
    documents = {ADAPTER: read_json(path / ADAPTER)} if ADAPTER in names else {}
    inside = next((one.parent for one in sorted(path.glob(f"*/{CONFIG}"))), None)
    inside = inside or next((one.parent for one in sorted(path.glob(f"snapshots/*/{CONFIG}"))), None)
    return instead(str(path), names, documents, None if inside is None else str(inside))


def read_index(file: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor, by plain file names only."""
    return weight_map_in(read_json(file), str(file))


def weight_map_in(index: Mapping[str, Json], file: str) -> dict[str, str]:
    """The same of an index that was read."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelDir(f"{file} has no weight_map.", hint=AGAIN)
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
        if not plain or not str(name).endswith(".safetensors"):
            raise BadModelDir(
                f"{file} places '{tensor}' in {name!r}, which is not a plain safetensors file name.",
                "An index may only point to files of its own folder.",
            )
    return cast("dict[str, str]", weight_map)


def _inside(path: Path, name: str) -> Path:
    """The file `name` of the folder, unless it leads elsewhere; the Hub's own blob store is part of the folder."""
    file = path / name
    if not file.exists():
        raise BadModelDir(
            f"{path} is incomplete: {name} is missing.",
            "The download probably stopped.",
            "download the model again (only what is missing is fetched).",
        )
    real, home = file.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise BadModelDir(f"{file} is a link that leaves the model folder (to {real}).")
    return file


def read_header(file: Path) -> tuple[int, dict[str, Entry]]:
    """Size of a file and its tensors; whatever the header says is checked against the file."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadModelDir(f"{file} cannot be opened: {error.strerror}.", hint=AGAIN) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptShard(f"{file.name} is not a regular file.")
        size_B = status.st_size
        start = _pread_all(fd, 8, 0)
        if start == LFS:
            raise BadModelDir(f"{file} is a pointer of Git LFS, not the weights.", hint="git lfs pull, in that folder.")
        if start[: len(MAGIC)] == MAGIC:
            raise BadModelDir(f"{file} is a GGUF file by another name.", hint=f"-m {file}")
        header_B = int.from_bytes(start, "little")
        if size_B == 0:
            raise _damaged(file, "it is empty")
        if file.suffix in PICKLES:
            return size_B, read_pickled(file)
        if len(start) < 8 or not 2 <= header_B <= min(MAX_HEADER_B, size_B - 8):
            raise _damaged(file, f"its header claims {header_B} bytes, the file has {size_B}")
        header = _pread_all(fd, header_B, 8)
    except OSError as error:
        raise _unreadable(file, error) from error
    finally:
        os.close(fd)
    if len(header) < header_B:
        raise _damaged(file, f"its header ends after {len(header)} of {header_B} bytes")
    return size_B, _parse_header(file, header, size_B)


def item_B(dtype: str, tensor: str) -> int:
    """Bytes of an item. Raises UnsupportedModel for one that is no whole byte, or unknown."""
    if dtype not in ITEM_B:
        raise UnsupportedModel(
            f"'{tensor}' is stored as {dtype}, which cannot be streamed.", None, "the 16-bit version of the model."
        )
    return ITEM_B[dtype]


def read_small(entry: Entry) -> bytes:
    """The bytes of a tensor that is part of a description, such as a quantisation state."""
    if entry.nbytes > MAX_SMALL_B:
        raise _damaged(entry.file, f"'{entry.name}' has {entry.nbytes} bytes, which is no description")
    try:
        fd = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _pread_all(fd, entry.nbytes, entry.offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(entry.file, error) from error


def _unreadable(file: Path, error: OSError) -> ReadFailed:
    return ReadFailed(
        f"could not read {file}: {error.strerror} (errno {error.errno}).",
        "The disk, the file system or the network behind it failed.",
        "again; if it stays so, specexec pull into a cache on another disk (HF_HOME).",
    )


def _pread_all(fd: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _parse_header(file: Path, header: bytes, size_B: int) -> dict[str, Entry]:
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(file, "its header is not a JSON object")
    base = 8 + len(header)
    content.pop("__metadata__", None)
    entries = {name: _entry(file, base, name, fields) for name, fields in content.items()}
    end, last = base, "The header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise _damaged(file, f"'{entry.name}' starts at byte {entry.offset}, expected {end} (a hole or an overlap)")
        end, last = end + entry.nbytes, f"'{entry.name}'"
    if end != size_B:
        raise CorruptShard(
            f"{file.name} is damaged: header says {end} bytes, file has {size_B}.",
            f"{last} ends there. "
            + ("The download probably stopped." if end > size_B else "Something was appended to it."),
            "download the model again (only what is missing is fetched).",
        )
    return entries


def _entry(file: Path, base: int, name: str, fields: object) -> Entry:
    if not isinstance(fields, dict):
        raise _damaged(file, f"the header entry of '{name}' is not an object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_B:
        raise _damaged(file, f"'{name}' has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(file, f"'{name}' has the shape {shape!r} at {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * ITEM_B[dtype]:
        raise _damaged(file, f"'{name}' is {dtype} {shape} but has {nbytes} bytes")
    return Entry(name, file, base + offsets[0], nbytes, dtype, tuple(shape))


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _damaged(file: Path, why: str) -> CorruptShard:
    return CorruptShard(f"{file.name} is damaged: {why}.", hint="download the model again.")
