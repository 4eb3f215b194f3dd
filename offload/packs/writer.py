"""Writes one safetensors file whose tensors can be read straight into place. Knows bytes and files, no model.

The header is padded with spaces so that the data starts at a multiple of 4096; the largest tensors come first and those
of odd sizes last, so that every weight starts at a multiple of 64. A file appears under its name only when it is whole.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import ITEM_B
from offload.checkpoint.manifest import CHUNK_B, PARTIAL, FinishedFile
from offload.checkpoint.tensors import ALIGN_B, CODES, read_entry
from offload.errors import DiskFull
from offload.machine.atomic_write import replacing

DATA_START_B = 4096


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Entry | torch.Tensor

    @property
    def rank(self) -> tuple[bool, int, int, str]:
        """Where it comes in the file; odd sizes by falling item size, so that each stays a multiple of its own."""
        odd = self.nbytes % ALIGN_B != 0
        return odd, -ITEM_B[self.dtype] if odd else 0, -self.nbytes, self.name


def write(
    path: Path,
    sources: Sequence[Entry | Mapping[str, torch.Tensor]],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> FinishedFile:
    """Write entries of other files as they are and tensors from memory; whole and on disk when this returns."""
    tensors = sorted((tensor for source in sources for tensor in _tensors(source)), key=lambda tensor: tensor.rank)
    digest, size_B = hashlib.sha256(), 0
    with _replacing(path) as file:
        for chunk in _chunks(tensors):
            file.write(chunk)
            digest.update(chunk)
            size_B += chunk.nbytes
            advance(chunk.nbytes)
    return FinishedFile(size_B, digest.hexdigest())


def write_small(path: Path, content: bytes) -> None:
    """Replace a small file at once: after a crash there is the old one or the new one."""
    with _replacing(path) as file:
        file.write(content)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """As `replacing`, by a name that is known for unfinished; what the disk refuses is said in our words."""
    try:
        with replacing(path, beside=path.with_name(path.name + PARTIAL)) as file:
            yield file
    except OSError as error:
        raise write_failed(path, error) from error


def write_failed(path: Path, error: OSError) -> DiskFull:
    """What to say when a file cannot be written; the one place that knows."""
    return DiskFull(
        f"{path} could not be written: {error.strerror}.",
        "Finished shards are kept.",
        "the same command after freeing space (it continues), or --out on another disk.",
    )


def _tensors(source: Entry | Mapping[str, torch.Tensor]) -> list[_Tensor]:
    if isinstance(source, Entry):
        return [_Tensor(source.name, source.dtype, source.shape, source.nbytes, source)]
    return [
        _Tensor(name, CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, tensor.contiguous())
        for name, tensor in source.items()
    ]


def _chunks(tensors: Sequence[_Tensor]) -> Iterator[memoryview]:
    """The file's bytes in order, a piece at a time."""
    yield memoryview(_header(tensors))
    buffer = memoryview(bytearray(min(CHUNK_B, max((tensor.nbytes for tensor in tensors), default=0))))
    for tensor in tensors:
        source = tensor.source
        if isinstance(source, torch.Tensor):
            yield source.reshape(-1).view(torch.uint8).numpy().data
            continue
        for start in range(0, source.nbytes, CHUNK_B):
            chunk = buffer[: min(CHUNK_B, source.nbytes - start)]
            read_entry(source, chunk, start)
            yield chunk


def _header(tensors: Sequence[_Tensor]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        content[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % DATA_START_B)
    return len(text).to_bytes(8, "little") + text
