"""Blocks of ggml's types as float32 values, by the same sums and products in the same order as ggml's reference.

Sources: ggml's `dequantize_row_*` (ggml-quants.c), checked bit by bit with gguf-py.   N blocks
"""

from collections.abc import Callable, Iterator

import torch

from offload.checkpoint.gguf.ggml_types import BY_NAME
from offload.checkpoint.quantized.quantize import SLICE_B
from offload.machine.thread_pool import share

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fill_rows(kind: str, codes: torch.Tensor, target: torch.Tensor, less: float = 0.0) -> None:
    """Fill `target`, whose rows in the order of the file may be spread, from `codes` [rows, bytes or items of a row].

    `target` is [rows, items] or [heads, rows of a head / 2, 2, items]. `less` is taken off every value.
    """
    rows_each = target[0, ..., 0].numel()

    def fill(run: slice) -> None:
        values = _values(kind, codes[run.start * rows_each : run.stop * rows_each])
        target[run].copy_((values - less if less else values).view(target[run].shape))

    if target.is_cuda:
        fill(slice(0, target.shape[0]))
    else:
        share(fill, _runs(target.shape[0], rows_each * target.shape[-1] * 4))


def _runs(count: int, each_B: int) -> Iterator[slice]:
    step = max(1, SLICE_B // each_B)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _values(kind: str, codes: torch.Tensor) -> torch.Tensor:
    if kind in FLOATS:
        return codes.float()
    return _BLOCKS[kind](codes.reshape(-1, BY_NAME[kind].nbytes))


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at a place of each block, as float32 [N, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Low halves of bytes [N, B], then their high halves: [N, 2 B]."""
    return torch.cat((codes & 15, codes >> 4), dim=1)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bit i of four bytes as 16 for item i: [N, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[:, :, None] >> shifts) & 1).view(-1, 32) << 4


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _pairs_of_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bits 0 and 1 of 32 bytes, then bits 2 and 3 of the same …: [N, 4 B], values 0…3."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    return ((codes.reshape(len(codes), -1, 1, 32) >> shifts[:, None]) & 3).view(len(codes), -1)


def _single_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bit 0 of 32 bytes, then bit 1 of the same …: [N, 256], values 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[:, None, :] >> shifts[:, None]) & 1).view(len(codes), -1)


def _halves_of(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Low halves of a run of bytes, then the high halves of the same, run after run: [N, 2 B]."""
    runs = codes.reshape(len(codes), -1, run)
    return torch.cat((runs & 15, runs >> 4), dim=2).view(len(codes), -1)


def _scaled(codes: torch.Tensor, scales: torch.Tensor, less: torch.Tensor | None = None) -> torch.Tensor:
    """Codes [N, 256] times the scale of their run [N, runs], less another number of the run."""
    values = codes.float().view(*scales.shape, -1).mul_(scales[..., None])
    return (values if less is None else values.sub_(less[..., None])).view(len(codes), -1)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    return _scaled(_pairs_of_bits(blocks[:, 16:80]), scales, _half(blocks, 82) * (blocks[:, :16] >> 4).float())


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, None, 104:108] >> shifts[:, None]) & 3).view(-1, 16) << 4
    scales = (_nibbles(blocks[:, 96:104]) | high).float().sub_(32)
    # The third bit says that nothing is taken off.
    codes = _pairs_of_bits(blocks[:, 32:96]).float().sub_(4).add_(_single_bits(blocks[:, :32]), alpha=4)
    return _scaled(codes, _half(blocks, 108) * scales)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each, from the twelve bytes that hold both."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    return scales.float(), torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1).float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _scaled(_halves_of(blocks[:, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _halves_of(blocks[:, 48:], 32) | (_single_bits(blocks[:, 16:48]) << 4)
    return _scaled(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    codes = _halves_of(blocks[:, :128], 64) | (_pairs_of_bits(blocks[:, 128:192]) << 4)
    return _scaled(codes.float().sub_(32), scales)


def _looked_up(codes: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    values = torch.tensor(table, dtype=torch.float32, device=codes.device)
    return values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _looked_up(_nibbles(blocks[:, 2:]), NONLINEAR).mul_(_half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).view(-1, 8)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).view(-1, 8)
    scales = (low | (high << 4)).float().sub_(32)
    return _scaled(_looked_up(_halves_of(blocks[:, 8:], 16), NONLINEAR), _half(blocks, 0) * scales)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    # Twice the values at half the power, as ggml has it; the lowest two powers are numbers without a leading bit.
    powers = blocks[:, :1].int()
    bits = torch.where(powers < 2, (powers + 1) << 21, (powers - 1) << 23)
    return _looked_up(_nibbles(blocks[:, 1:]), TWICE_FP4).mul_(bits.view(torch.float32))


# The values of IQ4's codes, and twice those of FP4 (E2M1).
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TWICE_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_BLOCKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
