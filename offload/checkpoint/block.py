"""What is read at once, and its place in memory: tensors of one layer, of some of its experts, or one of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import SCRATCH_B
from offload.checkpoint.mapping import Part
from offload.checkpoint.quantized.packed import Packed
from offload.checkpoint.routing import Routing
from offload.checkpoint.tensors import ALIGN_B, DTYPES
from offload.machine.files import LARGE_B, PAGE_B


@dataclass(frozen=True)
class TensorPart:
    """One tensor of a block: where it lies in the block's buffer and which bytes on disk make it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in the compute dtype."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor inside a block's buffer."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def target(self, part: Part, flat: torch.Tensor) -> torch.Tensor:
        """Where the part belongs inside a block's buffer."""
        start = self.offset // self.dtype.itemsize + part.offset
        return self.view(flat).as_strided(part.entry.shape, part.stride, start)

    def span(self, part: Part) -> tuple[int, int]:
        """Start and end of the part's bytes inside a block's buffer."""
        start = self.offset + part.offset * self.dtype.itemsize
        return start, start + part.extent * self.dtype.itemsize

    def placed(self, anywhere: bool) -> TensorPart:
        """The same not before where it is: where its address and its bytes on disk agree modulo a page, if it can be.

        Direct reads then need no copy. A piece that is small does not leave a hole for that. With `anywhere` it may
        begin at any multiple of its items: CPUs compute the same from there.
        """
        part, item_B = self.parts[0], self.dtype.itemsize
        align_B = item_B if anywhere else ALIGN_B
        residue = (part.entry.offset - part.offset * item_B) % PAGE_B
        hole_B = (residue - self.offset) % PAGE_B
        if self.direct(part) and residue % align_B == 0 and (hole_B == 0 or self.nbytes >= LARGE_B):
            return replace(self, offset=self.offset + hole_B)
        return replace(self, offset=aligned(self.offset))

    def direct(self, part: Part) -> bool:
        """Can the bytes be read as they are?"""
        if DTYPES[part.entry.dtype] != self.dtype:
            return False
        return torch.empty_strided(part.entry.shape, part.stride, device="meta").is_contiguous()


@dataclass(frozen=True)
class Sum:
    """A tensor of a block to which the products of others of its tensors are added."""

    name: str
    products: tuple[tuple[str, str, float], ...]
    """The names of B and of A, and the scale of their product."""


@dataclass(frozen=True)
class Block:
    """What is read at once: one layer, or one tensor of the rest."""

    label: str
    pieces: tuple[TensorPart, ...]
    packed: tuple[Packed, ...] = ()
    routing: Routing | None = None
    """Of a layer whose experts can be fetched one by one."""
    sums: tuple[Sum, ...] = ()

    def of(self, whose: Collection[int | None]) -> Block:
        """What belongs to these experts (None: to no expert) and nothing else, at the same places."""
        pieces = (
            replace(piece, parts=tuple(part for part in piece.parts if part.expert in whose)) for piece in self.pieces
        )
        return replace(self, pieces=tuple(piece for piece in pieces if piece.parts))

    @cached_property
    def shared(self) -> Block:
        """What every row computes with: all but the experts."""
        return self.of([None])

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of the runs of bytes that it fills of its buffer; holes that pieces leave are part of a run."""
        found: list[tuple[int, int]] = []
        for start, stop in sorted(piece.span(part) for piece in self.pieces for part in piece.parts):
            if found and start < found[-1][1] + PAGE_B:
                found[-1] = found[-1][0], max(stop, found[-1][1])
            else:
                found.append((start, stop))
        return found

    @property
    def dense_B(self) -> int:
        """Bytes of the scratch memory that holds what is dequantised for as long as the block is in use."""
        return sum(aligned(tensor.nbytes) for tensor in self.packed)

    @property
    def kept_B(self) -> int:
        """Bytes of a block of the rest, which is dequantised once and stays so."""
        return self.dense_B or self.size_B

    @property
    def size_B(self) -> int:
        """Bytes of the buffer that holds it."""
        last = self.pieces[-1]
        return last.offset + aligned(last.nbytes)

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """All that is read straight into place, in file order so that neighbours can be read at once."""
        found = [
            Copy(part.entry, piece.offset + part.offset * piece.dtype.itemsize)
            for piece in self.pieces
            for part in piece.parts
            if piece.direct(part)
        ]
        return tuple(sorted(found, key=lambda copy: (copy.entry.file, copy.entry.offset)))

    @cached_property
    def conversions(self) -> tuple[tuple[TensorPart, Part], ...]:
        """All that changes its dtype or its order on the way."""
        return tuple((piece, part) for piece in self.pieces for part in piece.parts if not piece.direct(part))

    @property
    def read_B(self) -> int:
        """Bytes that come from disk."""
        return sum(part.entry.nbytes for piece in self.pieces for part in piece.parts)

    @property
    def scratch_B(self) -> int:
        """Bytes needed beside the buffer while converting."""
        return max((rows.nbytes for _, part in self.conversions for _, rows in part.entry.slices(SCRATCH_B)), default=0)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """What travels, by name and all inside `flat`: tensors as the model wants them, and codes and scales."""
        return {piece.name: piece.view(flat) for piece in self.pieces}

    def dense(
        self,
        tensors: Mapping[str, torch.Tensor],
        scratch: torch.Tensor | None,
        whose: Collection[int | None] | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """What the model wants, by name: codes and scales among `views` dequantised into `scratch`.

        With `whose`, only those of these experts (None: of no expert) are.
        """
        if not self.packed:
            return tensors
        assert scratch is not None
        members = {
            entry.name for item in self.packed for _, weight in item.sources for entry in weight.members.values()
        }
        ready = {name: tensor for name, tensor in tensors.items() if name not in members}
        return ready | {item.name: item.unpack(tensors, scratch, whose) for item in self.packed}


@dataclass(frozen=True)
class Copy:
    """Bytes of a file that belong at `offset` of the buffer as they are."""

    entry: Entry
    offset: int


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGN_B) * ALIGN_B
