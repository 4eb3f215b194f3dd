"""How rows of keys and values lie in a cache: as they are computed, or in 8 or 4 bits. Knows no layer and no text.

A row in few bits is made of that row alone, when it is written, and whoever attends to it reads the same numbers: so a
text is the same whatever was guessed. That takes sums whose order does not show, for a rounding error of 1e-7 in a key
may be a whole step of its code, which the next layers and tokens multiply: attention to such rows sums in float64, and
what it finds is rounded far more coarsely than sums in another order differ.
Each head's numbers are turned by a Hadamard matrix first, which spreads the few large ones over all of their block
(QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4).
H heads   R rows   D numbers of a head   B bytes of a row of one head
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from specexec.errors import UnsupportedArchitecture

KVQuant: TypeAlias = Literal[8, 4]

BLOCK = 64  # numbers of a head that share a lowest value and a step, in float16 each
MARKS_B = 4
LARGEST = torch.finfo(torch.float16).max
SMALLEST = torch.finfo(torch.float16).smallest_normal
FOUND_BITS = 12  # significant bits of what attention finds, in models of more


class KeptRows(Protocol):
    """From rows to what a cache holds of them, and what attention makes of that."""

    def keep(self, rows_HRD: Tensor) -> Tensor:
        """What a cache holds of keys or values: [H, R, …], with nothing in it of other rows."""

    def read(self, kept: Tensor) -> Tensor:
        """The rows that lie there, [H, R, D], as attention takes them."""

    def plain(self, kept: Tensor) -> Tensor:
        """The rows that lie there, [H, R, D], as they were before they were kept."""

    def queries(self, query_HQD: Tensor) -> Tensor:
        """Queries as they meet keys that were read."""

    def found(self, mixed_HQD: Tensor, dtype: torch.dtype) -> Tensor:
        """What was mixed of values that were read, as the layer goes on with it."""


class WholeRows:
    """Rows lie as they were computed; attention sums in float32."""

    def keep(self, rows_HRD: Tensor) -> Tensor:
        """The same."""
        return rows_HRD

    def read(self, kept: Tensor) -> Tensor:
        """The same in float32."""
        return kept.float()

    def plain(self, kept: Tensor) -> Tensor:
        """The same in float32."""
        return kept.float()

    def queries(self, query_HQD: Tensor) -> Tensor:
        """The same."""
        return query_HQD

    def found(self, mixed_HQD: Tensor, dtype: torch.dtype) -> Tensor:
        """The same."""
        return mixed_HQD.to(dtype)


WHOLE = WholeRows()


@dataclass(frozen=True)
class FewBitRows:
    """Rows lie as uint8 [H, R, B]: codes, two a byte in 4 bits, and of each block its lowest value and its step."""

    bits: KVQuant

    def keep(self, rows_HRD: Tensor) -> Tensor:
        """Codes by the step that spreads a block's numbers over all of them. Raises UnsupportedArchitecture."""
        if rows_HRD.shape[-1] % 2:
            raise UnsupportedArchitecture(
                f"heads of {rows_HRD.shape[-1]} numbers cannot be kept in few bits, they are odd.",
                hint="leave --kv-quant out.",
            )
        most = 2**self.bits - 1
        codes, marks = [], []
        for block in turned(rows_HRD.float()).split(BLOCK, dim=-1):
            low, high = block.aminmax(dim=-1, keepdim=True)
            low_16 = low.clamp(-LARGEST, LARGEST).half()
            step_16 = ((high - low_16.float()) / most).clamp(max=LARGEST).half()
            scaled = (block - low_16.float()) / step_16.float().clamp(min=SMALLEST)
            codes.append(scaled.round_().clamp_(0, most).to(torch.uint8))
            marks += [low_16, step_16]
        codes_HRD = torch.cat(codes, dim=-1)
        if self.bits == 4:
            codes_HRD = codes_HRD[..., ::2] | (codes_HRD[..., 1::2] << 4)
        return torch.cat([codes_HRD, torch.cat(marks, dim=-1).view(torch.uint8)], dim=-1)

    def read(self, kept: Tensor) -> Tensor:
        """Code times step plus the lowest value, turned, in float64."""
        blocks = -(-kept.shape[-1] // (BLOCK * self.bits // 8 + MARKS_B))
        codes, marks = kept.split([kept.shape[-1] - MARKS_B * blocks, MARKS_B * blocks], dim=-1)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        rows_HRD = codes.double()
        numbers = marks.clone(memory_format=torch.contiguous_format).view(torch.float16).double()
        for block, low_step in zip(rows_HRD.split(BLOCK, dim=-1), numbers.split(2, dim=-1), strict=True):
            block.mul_(low_step[..., 1:]).add_(low_step[..., :1])
        return rows_HRD

    def plain(self, kept: Tensor) -> Tensor:
        """The same turned back, in float64."""
        return turned(self.read(kept))

    def queries(self, query_HQD: Tensor) -> Tensor:
        """Turned, in float64."""
        return turned(query_HQD.double())

    def found(self, mixed_HQD: Tensor, dtype: torch.dtype) -> Tensor:
        """Turned back and rounded: to `dtype`, and to FOUND_BITS significant bits where that has more."""
        fraction, exponent = torch.frexp(turned(mixed_HQD))
        return torch.ldexp(fraction.mul_(2**FOUND_BITS).round_(), exponent - FOUND_BITS).to(dtype)


def turned(rows_HRD: Tensor) -> Tensor:
    """Times a Hadamard matrix that is its own inverse, by sums and differences in the dtype of the rows.

    Of blocks as long as the largest power of two that divides D, BLOCK at most. Sums in one order however many rows
    there are: a row has the same bits beside any others.
    >>> turned(torch.tensor([4.0, 0.0, 0.0, 0.0])).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    D = rows_HRD.shape[-1]
    size = min(D & -D, BLOCK)
    blocks, width = rows_HRD.unflatten(-1, (D // size, size)), 1
    while width < size:
        left, right = blocks.unflatten(-1, (size // (2 * width), 2, width)).unbind(-2)
        blocks = torch.stack([left + right, left - right], dim=-2).flatten(-3)
        width *= 2
    return (blocks / math.sqrt(size)).flatten(-2)


def kept_rows(bits: KVQuant | None) -> KeptRows:
    """How rows lie in so many bits; None is as they are computed."""
    return WHOLE if bits is None else FewBitRows(bits)
