"""The header of a GGUF file: metadata and where each tensor lies. Trusts nothing; knows no model and no torch.

Layout as in ggml's docs/gguf.md, versions 2 and 3: magic, version, counts, metadata, tensor table, padding, data. Every
length is compared with what is left of the file before anything of that length is read.
"""

import math
import os
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from offload.checkpoint.gguf.ggml_types import GGML_TYPES, GgmlType
from offload.errors import BadModelDir, CorruptShard, ReadFailed, UnsupportedModel

Value: TypeAlias = "str | int | float | bool | list[str] | list[int] | list[float] | list[bool]"

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, MOST_ALIGNMENT = 32, 1 << 16
MOST_DIMENSIONS = 4
MOST_NAME_B = 1 << 16
MOST_HEADER_B = 1 << 28  # the largest vocabularies and their merges take some 20 MB
SHORT_STRINGS = 64  # longer lists of strings are vocabularies, which cost time to decode
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CHUNK_B = 4 << 20
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: `shape` as torch has it, rows first; `nbytes` bytes of the file from `offset`."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says before its weights. Long lists of strings are their length unless they were asked for."""

    file: Path
    size_B: int
    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]


def read_gguf(file: Path, wanted: Collection[str] = ()) -> GgufHeader:
    """The header of a GGUF file, with the long lists of strings that are `wanted` by their keys.

    Raises CorruptShard with the name of the field that makes no sense, UnsupportedModel for versions, byte orders and
    tensor types that cannot be read.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadModelDir(f"{file} cannot be opened: {error.strerror}.") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptShard(f"{file.name} is not a regular file.")
        return _header(_Bytes(fd, file, status.st_size), wanted)
    except OSError as error:
        raise ReadFailed(f"could not read {file}: {error.strerror} (errno {error.errno}).") from error
    finally:
        os.close(fd)


class _Bytes:
    """The beginning of a file, read as far as it is needed; `field` is what a refusal names."""

    def __init__(self, fd: int, file: Path, size_B: int) -> None:
        self.file, self.size_B, self.at, self.field = file, size_B, 0, "magic"
        self._fd, self._held = fd, bytearray()

    def refuse(self, why: str) -> CorruptShard:
        """What to say of a field that makes no sense."""
        return CorruptShard(f"{self.file.name} is damaged: {self.field} {why}.", hint="download the file again.")

    def claim(self, count: int, each_B: int) -> None:
        """Refuse so many items where the file ends before them."""
        left_B = min(self.size_B, MOST_HEADER_B) - self.at
        if count > left_B // each_B:
            raise self.refuse(f"claims {count} items of {each_B} bytes or more where {left_B} bytes can follow")

    def need(self, nbytes: int) -> int:
        """Where the next bytes begin; afterwards they count as read."""
        self.claim(nbytes, 1)
        start = self.at
        self.at += nbytes
        while len(self._held) < self.at:
            most_B = min(max(CHUNK_B, self.at - len(self._held)), self.size_B - len(self._held))
            chunk = os.pread(self._fd, most_B, len(self._held))
            if not chunk:
                raise self.refuse("lies behind the end of the file")
            self._held += chunk
        return start

    def take(self, form: str) -> tuple[int, ...]:
        """Numbers as `struct` names them, little end first."""
        form = f"<{form}"
        return struct.unpack_from(form, self._held, self.need(struct.calcsize(form)))

    def number(self, form: str) -> int:
        """One of them."""
        return self.take(form)[0]

    def text(self, most_B: int | None = None) -> str:
        """A string: its length and its bytes."""
        length = self.number("Q")
        if most_B is not None and length > most_B:
            raise self.refuse(f"has {length} bytes, more than the {most_B} that a name may have")
        start = self.need(length)
        return self._decoded(start, self.at)

    def texts(self, count: int, keep: bool) -> list[str] | int:
        """Strings one after another; without `keep` they are passed over and only their number is known."""
        self.claim(count, 8)
        if keep:
            return [self._decoded(start, stop) for start, stop in self._strings(count)]
        return sum(1 for _ in self._strings(count))

    def _strings(self, count: int) -> Iterator[tuple[int, int]]:
        """Where each begins and ends; a vocabulary has hundreds of thousands, so little is done for each."""
        length_of, held, at = LENGTH.unpack_from, self._held, self.at
        for _ in range(count):
            start = at + LENGTH.size
            if start > len(held):
                self._reach(at, start)
            at = start + length_of(held, at)[0]
            if at > len(held):
                self._reach(start, at)
            yield start, at
        self.at = at

    def _reach(self, start: int, stop: int) -> None:
        self.at = start
        self.need(stop - start)

    def _decoded(self, start: int, stop: int) -> str:
        try:
            return self._held[start:stop].decode()
        except UnicodeDecodeError as error:
            raise self.refuse(f"is not UTF-8 text ({error.reason})") from error


def _header(source: _Bytes, wanted: Collection[str]) -> GgufHeader:
    if source.size_B < 24:
        raise source.refuse(f"is cut off: the file has {source.size_B} bytes")
    magic = bytes(source.take("4B"))
    if magic != MAGIC:
        raise BadModelDir(
            f"{source.file} is not a GGUF file: it begins with {magic!r}.",
            "A safetensors file has a header of JSON at this place." if source.take("5B")[4:] == (ord("{"),) else None,
            "download it again, or -m with the folder of a safetensors model, if it is one.",
        )
    source.field = "version"
    version = source.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "has its bytes in the order of big-endian machines" if swapped in VERSIONS else f"is version {version}"
        raise UnsupportedModel(
            f"{source.file.name} {what}.", "Read are GGUF 2 and 3, little-endian.", "a newer file of the same model."
        )
    source.field = "tensor_count"
    tensor_count = source.number("Q")
    source.field = "metadata_kv_count"
    metadata = _metadata(source, source.number("Q"), wanted)
    source.field = "general.alignment"
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise source.refuse(f"is {alignment!r}, which is no power of two up to {MOST_ALIGNMENT}")
    return GgufHeader(source.file, source.size_B, metadata, _tensors(source, tensor_count, alignment))


def _metadata(source: _Bytes, count: int, wanted: Collection[str]) -> dict[str, Value]:
    source.claim(count, 13)  # a length, an empty name, a type, one byte
    found: dict[str, Value] = {}
    for index in range(count):
        source.field = f"the name of metadata field {index}"
        key = source.text(MOST_NAME_B)
        source.field = key or f"metadata field {index}, which has no name,"
        if key in found:
            raise source.refuse("is there twice")
        found[key] = _value(source, source.number("I"), key in wanted)
    return found


def _value(source: _Bytes, kind: int, keep: bool) -> Value:
    if kind in SCALARS:
        return source.number(SCALARS[kind])
    if kind == STRING:
        return source.text()
    if kind != ARRAY:
        raise source.refuse(f"has the unknown type {kind}")
    item, count = source.take("IQ")
    if item == STRING:
        return source.texts(count, keep or count <= SHORT_STRINGS)
    if item not in SCALARS:
        raise source.refuse(f"is a list of the unknown type {item}")
    source.claim(count, struct.calcsize(f"<{SCALARS[item]}"))
    return list(source.take(f"{count}{SCALARS[item]}"))


def _tensors(source: _Bytes, count: int, alignment: int) -> tuple[GgufTensor, ...]:
    source.field = "tensor_count"
    source.claim(count, 32)  # a name's length, dimensions, one of them, a type, an offset
    table = [_tensor_row(source, index) for index in range(count)]
    begin = -(-source.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, dims, kind, offset in table:
        source.field = f"tensor '{name}'"
        if name in found:
            raise source.refuse("is there twice")
        found[name] = _placed(source, name, dims, kind, begin + offset)
    _refuse_overlaps(source, found.values())
    return tuple(found.values())


def _tensor_row(source: _Bytes, index: int) -> tuple[str, tuple[int, ...], int, int]:
    source.field = f"the name of tensor {index}"
    name = source.text(MOST_NAME_B)
    source.field = f"tensor '{name}'"
    dimensions = source.number("I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise source.refuse(f"has {dimensions} dimensions")
    dims = source.take(f"{dimensions}Q")
    kind, offset = source.take("IQ")
    return name, dims, kind, offset


def _placed(source: _Bytes, name: str, dims: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    if kind not in GGML_TYPES:
        raise UnsupportedModel(
            f"'{name}' of {source.file.name} is stored in ggml's type {kind}, which cannot be read.",
            f"Read are {', '.join(one.name for one in GGML_TYPES.values())}.",
            "a file of the same model in one of those, such as Q4_K_M or Q8_0.",
        )
    stored = GGML_TYPES[kind]
    if 0 in dims or dims[0] % stored.items:
        raise source.refuse(f"has rows of {dims[0]} items, {stored.name} stores {stored.items} at a time")
    nbytes = math.prod(dims) // stored.items * stored.nbytes
    if offset + nbytes > source.size_B:
        raise source.refuse(f"ends at byte {offset + nbytes}, the file has {source.size_B}")
    return GgufTensor(name, stored, tuple(reversed(dims)), offset, nbytes)


def _refuse_overlaps(source: _Bytes, tensors: Collection[GgufTensor]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            source.field = f"tensor '{tensor.name}'"
            raise source.refuse(f"begins inside of '{before}'")
        end, before = tensor.offset + tensor.nbytes, tensor.name
