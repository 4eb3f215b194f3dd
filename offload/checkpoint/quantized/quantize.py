"""Weights in few bits and back: NF4 through bitsandbytes, int8 by rows, MXFP4. Knows tensors, no files and no layers.

Dequantising gives the same dense weight whatever is multiplied with it afterwards: exactness rests on that. Nothing
here looks at how many tokens a sweep has.   E experts   O outputs   I inputs
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pkgutil import resolve_name
from types import ModuleType
from typing import Literal

import torch

from offload.checkpoint.documents import Json
from offload.checkpoint.quantized.formats import STORED_FORMATS
from offload.checkpoint.quantized.row_codes import INT8_STEP
from offload.checkpoint.quantized.stored import Quantised
from offload.errors import MissingLibrary
from offload.machine.thread_pool import Piece, share

Quant = Literal["none", "int8", "nf4"]

BLOCK = 64
NESTED_BLOCK = 256
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dequantised values pass through a piece of memory on their way to a CPU's weights: small enough for its second cache,
# and for malloc to hand it out again instead of asking the system for new pages every time.
SLICE_B = 512 << 10
# A state is JSON padded to this length, so that sizes are known beforehand and what follows stays aligned.
STATE_B = 256
# What config.json says about weights in the layouts of bitsandbytes.
CONFIGS: dict[Quant, dict[str, Json]] = {
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
    },
}
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def bitsandbytes() -> ModuleType:
    """bitsandbytes' functional API, imported when the first 4-bit weight needs it."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    # It warns about a faster CPU kernel that would multiply without dequantising; we never call it.
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise MissingLibrary(
            "4-bit weights need the package bitsandbytes, which cannot be imported.",
            str(error),
            "pip install bitsandbytes",
        ) from error
    finally:
        logger.setLevel(level)
    return functional


def quantise(weight: torch.Tensor, name: str, quant: Quant) -> dict[str, torch.Tensor]:
    """The tensors that hold `weight` in few bits, by their names on disk. Experts are quantised one by one."""
    if quant == "none":
        return {name: weight}
    if quant == "int8":
        codes, scales = quantise_int8(weight)
        return {name: codes, f"{name.removesuffix('.weight')}.SCB": scales}
    return _quantise_nf4(weight, name)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in -127…127 and the largest magnitude of each row (the last dimension)."""
    values = weight.float()
    scales = values.abs().amax(dim=-1)
    steps = torch.where(scales > 0, 127.0 / scales, 0.0)
    return (values * steps[..., None]).round().clamp_(-127, 127).to(torch.int8), scales


def _quantise_nf4(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    functional = bitsandbytes()
    stack = weight if weight.dim() == 3 else weight[None]
    done = [
        functional.quantize_4bit(matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        for matrix in stack
    ]
    codes, states = [packed for packed, _ in done], [state for _, state in done]
    offsets = [float(state.offset) for state in states]
    stacked = weight.dim() == 3
    description = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offsets if stacked else offsets[0],
    }
    text = json.dumps(description).encode()
    text += b" " * (-len(text) % STATE_B)
    tensors = {
        "": torch.stack([packed.flatten() for packed in codes]) if stacked else codes[0],
        ".absmax": torch.stack([state.absmax for state in states]) if stacked else states[0].absmax,
        ".nested_absmax": torch.stack([s.state2.absmax for s in states]) if stacked else states[0].state2.absmax,
        ".quant_map": states[0].code,
        ".nested_quant_map": states[0].state2.code,
        f".quant_state.{'specexec' if stacked else 'bitsandbytes'}__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }
    return {name + suffix: tensor.cpu() for suffix, tensor in tensors.items()}


def dequantise(weight: Quantised, members: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    """Fill `target`, a view of the weight's shape in the compute dtype, from the members by role."""
    resolve_name(STORED_FORMATS[weight.scheme].dequantise)(weight, members, target)


def dequantise_4bit(weight: Quantised, members: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    """NF4 or FP4 in blocks, whose scales may be quantised themselves."""
    functional = bitsandbytes()
    codes = members["codes"].reshape(-1).view(torch.uint8).view(weight.matrices, -1)
    absmax = members["absmax"].view(weight.matrices, -1)
    for index, matrix in enumerate(target if weight.matrices > 1 else target[None]):
        scales = absmax[index]
        if weight.offsets:
            scales = functional.dequantize_blockwise(
                scales,
                absmax=members["nested_absmax"].view(weight.matrices, -1)[index],
                code=members["nested_quant_map"],
                blocksize=weight.nested_blocksize,
            )
            scales += weight.offsets[index]
        _fill_4bit(functional, weight, codes[index], scales, matrix)


def _fill_4bit(
    functional: ModuleType, weight: Quantised, codes: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor
) -> None:
    stored = DTYPES[weight.dtype]
    if matrix.is_contiguous() and not matrix.is_cpu and matrix.dtype == stored:
        functional.dequantize_4bit(
            codes[:, None], absmax=scales, out=matrix, blocksize=weight.blocksize, quant_type=weight.scheme
        )
        return
    flat = matrix.view(-1) if matrix.is_contiguous() else matrix.new_empty(matrix.numel())
    step = SLICE_B // stored.itemsize if matrix.is_cpu else matrix.numel()

    def fill(run: tuple[int, int]) -> None:
        start, length = run
        state = functional.QuantState(
            absmax=scales[start // weight.blocksize : -(-(start + length) // weight.blocksize)],
            # As rows of one block: bitsandbytes 0.50 reads wrong scales on the CPU where rows are no whole blocks.
            shape=torch.Size((-(-length // weight.blocksize), min(length, weight.blocksize))),
            blocksize=weight.blocksize,
            quant_type=weight.scheme,
            dtype=stored,
        )
        dense = functional.dequantize_4bit(codes[start // 2 : -(-(start + length) // 2)], state)
        flat[start : start + length].copy_(dense.view(-1))

    _each(fill, _block_runs(matrix.numel(), weight.blocksize, step), matrix)
    if not matrix.is_contiguous():
        matrix.copy_(flat.view(matrix.shape))


def _block_runs(count: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and length of runs of whole blocks, and last of what is less than a block."""
    whole, step = count - count % block, max(most - most % block, block)
    for start in range(0, whole, step):
        yield start, min(step, whole - start)
    if whole < count:
        yield whole, count - whole


def dequantise_int8(weight: Quantised, members: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    """Codes times the scale of their row."""
    codes, scales = members["codes"], members["scales"]

    def fill(piece: tuple[int, slice]) -> None:
        expert, rows = piece
        dense = codes_EOI[expert, rows].float()
        target_EOI[expert, rows].copy_(dense.mul_(scales_EO[expert, rows, None]).mul_(INT8_STEP))

    O, I = codes.shape[-2:]
    codes_EOI, scales_EO, target_EOI = codes.view(-1, O, I), scales.view(-1, O), target.view(-1, O, I)
    slices = list(_slices(codes_EOI[0], I * 4))
    _each(fill, ((expert, rows) for expert in range(len(codes_EOI)) for rows in slices), target)


def dequantise_mxfp4(weight: Quantised, members: Mapping[str, torch.Tensor], target: torch.Tensor) -> None:
    """Codes [E, O, G groups, B bytes] of two values each, the low half first, into a target [E, I, O]."""
    codes, scales = members["codes"], members["scales"]
    wide = torch.float32 if target.dtype == torch.float16 else target.dtype  # which holds every power of two
    values = torch.tensor(MXFP4_VALUES, dtype=wide, device=target.device)
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - 127).to(target.device, wide)
    E, O, G, B = codes.shape

    def fill(expert: int) -> None:
        # Turned round while it is small: then all that follows runs along memory.
        codes_GBO = codes[expert].view(O, G * B).t().contiguous().view(G, B, O)
        powers_GO = powers.index_select(0, scales[expert].t().reshape(-1).int()).view(G, 1, O)
        target_GBO2 = target[expert].view(G, B, 2, O).transpose(2, 3)
        for groups in _slices(codes_GBO, B * O * 4):
            for half, chosen in enumerate((codes_GBO[groups] & 15, codes_GBO[groups] >> 4)):
                dense = values.index_select(0, chosen.view(-1).int()).view(chosen.shape)
                target_GBO2[groups, ..., half].copy_(dense.mul_(powers_GO[groups]))

    _each(fill, range(E), target)


def _each(fill: Callable[[Piece], object], pieces: Iterable[Piece], target: torch.Tensor) -> None:
    """Fill every piece of the target; several at a time on a CPU, in the order of its stream on a GPU."""
    if target.is_cpu:
        share(fill, pieces)
        return
    for piece in pieces:
        fill(piece)


def _slices(codes: torch.Tensor, each_B: int) -> Iterator[slice]:
    """Slices of the first dimension, of which one index takes `each_B` bytes on its way."""
    step = max(1, SLICE_B // each_B) if codes.is_cpu else codes.shape[0]
    for start in range(0, codes.shape[0], step):
        yield slice(start, start + step)
