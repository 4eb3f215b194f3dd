"""A tensor stored in few bits: where it lies when dequantised, unless it computes as it is. Knows no file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from offload.checkpoint.mapping import Part
from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.weight import STACKED, Quantised


@dataclass(frozen=True)
class Packed:
    """One tensor of a block that travels in few bits: where it lies when dequantised, and what it is made of."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    sources: tuple[tuple[Part, Quantised], ...]
    in_integers: bool = False
    """It is never dequantised: its linear computes with the codes."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in the compute dtype."""
        return 0 if self.in_integers else torch.Size(self.shape).numel() * self.dtype.itemsize

    def unpack(
        self, members: Mapping[str, torch.Tensor], scratch: torch.Tensor, whose: Collection[int | None] | None = None
    ) -> torch.Tensor:
        """The dense tensor inside `scratch`; only what belongs to these experts (None: to no expert) is computed."""
        if self.in_integers:
            ((_, weight),) = self.sources
            codes, scales = (members[weight.members[role].name] for role in ("codes", "scales"))
            return RowCodes.of(codes, scales, self.dtype)
        dense = scratch[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)
        for part, weight in self.sources:
            if whose is not None and part.expert not in whose:
                continue
            held = {role: members[entry.name] for role, entry in weight.members.items()}
            if weight.expert is not None:
                its = slice(weight.expert, weight.expert + 1)
                held |= {role: held[role][its] for role in STACKED if role in held}
            target = dense.as_strided(part.entry.shape, part.stride, dense.storage_offset() + part.offset)
            if part.entry.shape == weight.shape:
                dequantise(weight, held, target)
                continue
            # Some rows of what is fused on disk: `whole` counts a byte for each element.
            whole = dense.new_empty(weight.shape)
            dequantise(weight, held, whole)
            start = part.entry.offset // (whole.numel() // weight.shape[0])
            target.copy_(whole[start : start + part.entry.shape[0]])
        return dense
