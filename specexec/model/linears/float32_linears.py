"""Linears with 16-bit weights on a CPU without 16-bit arithmetic: in float32, a block of weights at a time.

Such a CPU takes two to four times as long over the 16-bit kernels as over float32, from a tile of rows on. Widening is
exact, and a block stays in the cache from its widening to its product, so memory gives no more bytes than before.
Blocks may be shared among threads: who calls says how.
Sums run over all inputs in float32 and are rounded once, which is what 16-bit kernels promise too.
R rows   I inputs   O outputs
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from specexec.sizes import WIDENED

STEP = 128  # outputs of a thread's block, at least: 2048 inputs make a megabyte of float32, the second cache of common
BLOCK = 1 << 18  # CPUs. Of narrower weights it has as many.
SMALL = 1 << 18  # weights that are not worth waking threads for
# What a CPU must have, any of it, to be quicker without us.
KERNELS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


class Share(Protocol):
    """Does some work on every piece; the pieces do not depend on each other."""

    def __call__(self, work: Callable[[int], object], pieces: Iterable[int], /) -> None: ...


def in_turn(work: Callable[[int], object], pieces: Iterable[int]) -> None:
    """One piece after the other."""
    for piece in pieces:
        work(piece)


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linears are quicker widened: on x86 without instructions for the dtype, as far as this torch knows."""
    if device.type != "cpu" or dtype not in KERNELS or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return not any(has.get(name) for name in KERNELS[dtype])


def linear(rows: Tensor, weight_OI: Tensor, bias: Tensor | None = None, *, share: Share = in_turn) -> Tensor:
    """`torch.nn.functional.linear` of [..., I] rows, in their dtype; weights may have any strides."""
    O, I = weight_OI.shape
    rows_IR = rows.reshape(-1, I).t().float().contiguous()
    products_OR = rows_IR.new_empty(O, rows_IR.shape[1])
    threads = torch.get_num_threads()
    step = O if O * I <= SMALL else max(1, min(max(STEP, BLOCK // I), WIDENED // threads // I, O))
    blocks = deque(rows_IR.new_empty(min(threads, -(-O // step)), step, I).unbind())

    def multiply(start: int) -> None:
        narrow_OI = weight_OI[start : start + step]
        block_OI = blocks.pop()
        torch.mm(block_OI[: len(narrow_OI)].copy_(narrow_OI), rows_IR, out=products_OR[start : start + step])
        blocks.append(block_OI)

    share(multiply, range(0, O, step))
    if bias is not None:
        products_OR += bias[:, None]
    return rows.new_empty(*rows.shape[:-1], O).copy_(products_OR.t().view(*rows.shape[:-1], O))


class WidenedLinear(nn.Linear):
    """A linear that computes so, unless its weight multiplies in a way of its own."""

    share: Share

    def forward(self, input: Tensor) -> Tensor:
        """Products [..., O] of rows [..., I]."""
        if not _narrow(self.weight):
            return nn.functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias, share=self.share)


class WidenedConv1D(Conv1D):
    """The same of GPT-2's linear, whose weight is [I, O]."""

    share: Share

    def forward(self, x: Tensor) -> Tensor:
        """Products [..., O] of rows [..., I]."""
        return linear(x, self.weight.t(), self.bias, share=self.share) if _narrow(self.weight) else super().forward(x)


CLASSES: dict[type, type] = {nn.Linear: WidenedLinear, Conv1D: WidenedConv1D}


class Widened(TorchFunctionMode):
    """While active, every linear with 16-bit weights in main memory runs so."""

    def __init__(self, share: Share = in_turn) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and _narrow(args[1]):
            return linear(*args, **(kwargs or {}), share=self._share)
        return func(*args, **(kwargs or {}))


def _narrow(weight: Tensor) -> bool:
    """Whether these are plain numbers of 16 bits on the CPU; weights of another type multiply in their own way."""
    return type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype in KERNELS
