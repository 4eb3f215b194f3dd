"""Weights put into few bits, as packs hold them: NF4 through bitsandbytes, int8 and int4. Knows tensors, no files."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal

import torch

from offload.checkpoint.documents import Json
from offload.checkpoint.quantized.arithmetic.group_codes import in_groups
from offload.checkpoint.quantized.arithmetic.pieces import fill_each, runs
from offload.checkpoint.quantized.int4 import GROUP
from offload.errors import MissingLibrary

Quant = Literal["none", "int8", "int4", "nf4"]

BLOCK = 64
NESTED_BLOCK = 256
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


@cache
def bitsandbytes() -> ModuleType:
    """bitsandbytes' functional API, imported when the first 4-bit weight needs it."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    # It warns about a faster CPU kernel that would multiply without dequantising; we never call it.
    logger.setLevel(logging.ERROR)
    try:
        with _uncompiled():
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


@contextmanager
def _uncompiled() -> Iterator[None]:
    """bitsandbytes has what stands in for its kernels compiled, and torch's compiler takes seconds to import."""
    original = torch.compile
    setattr(torch, "compile", lambda function, **_: function)  # noqa: B010 - it has many overloads
    try:
        yield
    finally:
        setattr(torch, "compile", original)  # noqa: B010


def quantise(weight: torch.Tensor, name: str, quant: Quant) -> dict[str, torch.Tensor]:
    """The tensors that hold `weight` in few bits, by their names on disk. Experts are quantised one by one."""
    if quant == "none":
        return {name: weight}
    if quant == "int8":
        codes, scales = quantise_int8(weight)
        return {name: codes, f"{name.removesuffix('.weight')}.SCB": scales}
    if quant == "int4":
        return _quantise_int4(weight, name)
    return _quantise_nf4(weight, name)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in -127…127 and the largest magnitude of each row (the last dimension)."""
    values = weight.float()
    scales = values.abs().amax(dim=-1)
    steps = torch.where(scales > 0, 127.0 / scales, 0.0)
    return (values * steps[..., None]).round().clamp_(-127, 127).to(torch.int8), scales


def _quantise_int4(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    *outer, I = weight.shape
    rows_RI = weight.reshape(-1, I)
    made = {
        "codes": torch.empty(len(rows_RI), I // 2, dtype=torch.uint8),
        "steps": torch.empty(len(rows_RI), I // GROUP, dtype=torch.uint8),
        "origins": torch.empty(len(rows_RI), I // GROUP, dtype=torch.int8),
        "scales": torch.empty(len(rows_RI)),
    }

    def fill(rows: slice) -> None:
        for whole, part in zip(made.values(), in_groups(rows_RI[rows]), strict=True):
            whole[rows] = part

    fill_each(fill, runs(len(rows_RI), 4 * I, rows_RI), rows_RI)
    prefix = name.removesuffix(".weight")
    names = {role: f"{prefix}.int4_{role}" for role in made} | {"codes": name}
    return {names[role]: tensor.unflatten(0, outer) for role, tensor in made.items()}


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
