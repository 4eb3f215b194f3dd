"""The records of a file that torch.save wrote, a zip archive without compression: where each one's bytes lie."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from offload.errors import CorruptShard, UnsupportedModel

LOCAL_B, NAMES_AT = 30, 26  # a record's own header, and where in it the lengths of what follows it are
MOST_DESCRIPTION_B = 64 << 20  # of tensors; that of a head is some kB
DESCRIPTION, ORDER = "data.pkl", "byteorder"


@dataclass(frozen=True)
class TorchArchive:
    """What describes the tensors, and by name which bytes of the file hold their numbers."""

    description: bytes
    records: Mapping[str, range]


def open_archive(file: Path) -> TorchArchive:
    """Raises UnsupportedModel for what torch saved before 1.6 or for other byte orders, CorruptShard for damage."""
    try:
        with zipfile.ZipFile(file) as held, file.open("rb") as raw:
            inside = {name.partition("/")[2]: held.getinfo(name) for name in held.namelist()}
            records = {name: _record(raw, one, file.stat().st_size) for name, one in inside.items()}
            if DESCRIPTION not in inside:
                raise CorruptShard(f"{file.name} is no file of torch.save: it holds no {DESCRIPTION}.")
            if any(one.compress_type != zipfile.ZIP_STORED for one in inside.values()):
                raise CorruptShard(f"{file.name} is no file of torch.save: its records are compressed.")
            if any(len(records[name]) > MOST_DESCRIPTION_B for name in (DESCRIPTION, ORDER) if name in records):
                raise CorruptShard(f"{file.name} describes its tensors in more than {MOST_DESCRIPTION_B} bytes.")
            if ORDER in inside and held.read(inside[ORDER]) != b"little":
                raise UnsupportedModel(f"{file.name} was saved on a machine that writes numbers the other way round.")
            return TorchArchive(held.read(inside[DESCRIPTION]), records)
    # A directory can also claim passwords, later versions of zip, names in no encoding and bytes that are not there.
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
        raise UnsupportedModel(
            f"{file.name} cannot be read: {str(error).lower().rstrip('.') or 'it ends too early'}.",
            "torch.save has written zip archives since torch 1.6; this is an older file, or not all of it.",
            "download it again, or save it anew as safetensors (docs/heads.md says how).",
        ) from error


def _record(raw: BinaryIO, found: zipfile.ZipInfo, size_B: int) -> range:
    """Raises BadZipFile for one that does not lie within `size_B`."""
    raw.seek(min(max(found.header_offset, 0), size_B) + NAMES_AT)
    lengths = raw.read(LOCAL_B - NAMES_AT)
    after_B = sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
    first = found.header_offset + LOCAL_B + after_B
    if found.header_offset < 0 or first + found.file_size > size_B:
        raise zipfile.BadZipFile(f"its record '{found.filename}' ends behind the file")
    return range(first, first + found.file_size)
