"""Tensors as files hold them: their types, their alignment, and one of them read into memory."""

import os

import torch

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder
from offload.errors import ReadFailed
from offload.machine.files import read_exactly

# Unaligned views once changed one-row float32 results by 1e-5; 64 bytes is what torch's own allocator gives.
ALIGN_B = 64
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_entry(entry: Entry, view: memoryview, start: int) -> None:
    """Fill `view` with the bytes of a tensor from byte `start` on. Raises ReadFailed, also for a short file."""
    try:
        fd = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            whole = read_exactly(fd, view, entry.offset + start)
        finally:
            os.close(fd)
    except OSError as error:
        raise ReadFailed(f"could not read {entry.file.name} ('{entry.name}'): {error.strerror}.") from error
    if not whole:
        raise ReadFailed(f"could not read {entry.file.name} ('{entry.name}'): the file ends too early.")


def load_entry(entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of a file, in memory of its own."""
    buffer = bytearray(entry.nbytes)
    read_entry(entry, memoryview(buffer), 0)
    return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)


def read_tensors(folder: Folder) -> dict[str, torch.Tensor]:
    """All tensors of a small folder, as they are stored."""
    return {name: load_entry(entry, DTYPES[entry.dtype]) for name, entry in folder.entries.items()}
