"""One file of the prefix cache: tensors, what they are, and a digest of both. Knows no model and no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from offload.machine.atomic_write import PRIVATE, replacing

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "1"


class DamagedPiece(Exception):
    """It does not hold what was written, or something else was written there."""


@dataclass(frozen=True)
class PrefixPiece:
    """Tensors under the name of a text, and what its cache says of them (KVCache)."""

    name: str
    recurrent: bool
    stepwise: bool
    dropped: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size_B(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_piece(path: Path, piece: PrefixPiece) -> None:
    """Put a file in its place, whole or not at all, for its owner alone. Raises OSError."""
    from safetensors.torch import save

    held = {name: tensor.contiguous().cpu() for name, tensor in piece.tensors.items()}
    marks = {name: value for name, value in vars(piece).items() if name != "tensors"}
    head = json.dumps(marks)
    content = save(held, {"specexec_prefix": FORMAT, "head": head, "digest": _digest(head, held)})
    with replacing(path, PRIVATE) as file:
        file.write(content)


def read_piece(path: Path, name: str) -> PrefixPiece:
    """What was written under this name. Raises DamagedPiece for anything else, FileNotFoundError where nothing is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        if marks.get("specexec_prefix") != FORMAT or marks.get("digest") != _digest(marks["head"], tensors):
            raise DamagedPiece
        piece = PrefixPiece(**json.loads(marks["head"]), tensors=tensors)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as problem:
        raise DamagedPiece from problem
    if piece.name != name:
        raise DamagedPiece
    return piece


def _digest(head: str, tensors: Mapping[str, Tensor]) -> str:
    import torch

    seen = blake2b(head.encode(), digest_size=16)
    for name in sorted(tensors):
        seen.update(f"{name} {tensors[name].dtype} {[*tensors[name].shape]}\n".encode())
        seen.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
