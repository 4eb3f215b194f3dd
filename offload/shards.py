"""Which bytes of which file hold each tensor of a checkpoint folder. Knows no torch and believes no file.

Everything comes from config.json, the index and the safetensors headers; nothing is read that was not checked first.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

from offload.errors import BadModelDir, CorruptShard

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"  # of a pack
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# The safetensors library refuses larger headers too; a 70B header is about 100 KB.
MAX_HEADER_B = 100_000_000
MAX_SMALL_B = 1 << 20
# Tensors that change their dtype are read so much at a time: large enough for the disk, small enough to forget.
SCRATCH_B = 16 << 20
ITEM_B = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: `nbytes` bytes of `file` from `offset`, row-major."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def rows(self, start: int, length: int) -> "Entry":
        """The part of the tensor that holds `length` rows of its first dimension."""
        row_B = self.nbytes // self.shape[0]
        return replace(self, offset=self.offset + start * row_B, nbytes=length * row_B, shape=(length, *self.shape[1:]))

    def slices(self, most_B: int) -> "Iterator[tuple[int, Entry]]":
        """First row and rows of pieces of at most `most_B` bytes, or of one row where that is larger."""
        if self.nbytes <= most_B or not self.shape:
            yield 0, self
            return
        rows = max(1, most_B // (self.nbytes // self.shape[0]))
        for start in range(0, self.shape[0], rows):
            yield start, self.rows(start, min(rows, self.shape[0] - start))


@dataclass(frozen=True)
class Folder:
    """A checked model folder: its config and where every tensor lies."""

    path: Path
    config: dict[str, Json]
    entries: dict[str, Entry]
    file_sizes: dict[Path, int]

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return str(self.config.get("model_type", "unknown"))


def open_folder(path: Path) -> Folder:
    """Check a model folder down to every header; no weight is read."""
    config = read_config(path)
    if (path / INDEX).is_file():
        wanted = read_index(path)
        files = sorted(set(wanted.values()))
    elif (path / SINGLE).is_file():
        wanted, files = None, [SINGLE]
    else:
        raise _no_weights(path)
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
                    f"{name} lacks the tensor '{tensor}' that {INDEX} places there.",
                    "Index and shards come from different downloads, or one of them was edited.",
                    "download the model again.",
                )
            entries[tensor] = held[tensor]
    return Folder(path, config, entries, sizes)


def read_config(path: Path) -> dict[str, Json]:
    """The folder's config.json; says what is there instead if it is no model folder."""
    if not path.is_dir():
        raise BadModelDir(f"{path} is not a folder.", hint="give the folder that holds config.json.")
    file = path / "config.json"
    if not file.is_file():
        if (path / MANIFEST).is_file():
            raise BadModelDir(
                f"{path} is a pack that is not finished.", hint="the specexec pack or pull that began it."
            )
        found = _count_suffixes(path)
        raise BadModelDir(
            f"{path} is not a model folder: config.json is missing{found}.",
            "specexec reads safetensors checkpoints with config.json and tokenizer.json. GGUF is not supported.",
        )
    return read_json_object(file)


def read_json_object(file: Path) -> dict[str, Json]:
    """The JSON object in a file. Raises BadModelDir."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelDir(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BadModelDir(f"{file} is not a JSON object.")
    return cast("dict[str, Json]", content)


def _count_suffixes(path: Path) -> str:
    counts: dict[str, int] = {}
    for file in path.iterdir():
        if file.suffix in (".gguf", ".safetensors", *PICKLES):
            counts[file.suffix] = counts.get(file.suffix, 0) + 1
    return f" (found {', '.join(f'{n} {suffix}' for suffix, n in sorted(counts.items()))} files)" if counts else ""


def _no_weights(path: Path) -> BadModelDir:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        return BadModelDir(
            f"{path} holds its weights as pickle ({pickles[0]}), which can run code when loaded.",
            "specexec reads safetensors only.",
            "a safetensors version of the model, or convert it with transformers' save_pretrained.",
        )
    return BadModelDir(
        f"{path} is not a model folder: neither {SINGLE} nor {INDEX} is there{_count_suffixes(path)}.",
        "specexec reads safetensors checkpoints with config.json and tokenizer.json. GGUF is not supported.",
    )


def read_index(path: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor, by plain file names only."""
    weight_map = read_json_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelDir(f"{path / INDEX} has no weight_map.", hint="download the model again.")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
        if not plain or not str(name).endswith(".safetensors"):
            raise BadModelDir(
                f"{path / INDEX} places '{tensor}' in {name!r}, which is not a plain safetensors file name.",
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
    """Size of a safetensors file and its tensors; whatever the header says is checked against the file."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadModelDir(f"{file} cannot be opened: {error.strerror}.") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptShard(f"{file.name} is not a regular file.")
        size_B = status.st_size
        start = _pread_all(fd, 8, 0)
        header_B = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= header_B <= min(MAX_HEADER_B, size_B - 8):
            raise _damaged(file, f"its header claims {header_B} bytes, the file has {size_B}")
        header = _pread_all(fd, header_B, 8)
    finally:
        os.close(fd)
    if len(header) < header_B:
        raise _damaged(file, f"its header ends after {len(header)} of {header_B} bytes")
    return size_B, _parse_header(file, header, size_B)


def read_small(entry: Entry) -> bytes:
    """The bytes of a tensor that is part of a description, such as a quantisation state."""
    if entry.nbytes > MAX_SMALL_B:
        raise _damaged(entry.file, f"'{entry.name}' has {entry.nbytes} bytes, which is no description")
    fd = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _pread_all(fd, entry.nbytes, entry.offset)
    finally:
        os.close(fd)


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
    end = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise _damaged(file, f"'{entry.name}' starts at byte {entry.offset}, expected {end} (a hole or an overlap)")
        end += entry.nbytes
    if end != size_B:
        raise CorruptShard(
            f"{file.name} is damaged: header says {end} bytes, file has {size_B}.",
            "The download probably stopped." if end > size_B else "Something was appended to it.",
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
