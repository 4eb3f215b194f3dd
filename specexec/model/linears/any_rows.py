"""Linears in float32 on a CPU that give a row the same bits among any number of rows, where torch's own do not.

A kernel cuts a product into blocks by the product's sizes, and another cut of the inputs is another rounding: a row of
MKL's products differs among 16 and among 64 where two threads share them. oneDNN's inner product sums in one order from
2 rows up, and is quicker over few rows. In 16 bits torch's own stay: products that give a row the same bits there, of
one shape for all, took two to four times as long over 64 rows and more.

For every shape and number of rows oneDNN compiles a kernel of some 0.6 MB, half of which it never gives back. So
larger numbers of rows are filled up to a few: without that 128 numbers and six shapes held 437 MiB (torch 2.13).

R rows   I inputs   O outputs
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specexec.model.linears import float32_linears as widened
from specexec.model.module_types import every_module
from specexec.sizes import CHUNK

LEAST = 2  # rows from which on sums have one order
FEW = 16  # up to so many rows, filling them up would cost more than it saves
MANY = (24, 32, 48, 64, 80, 96, 128, 160, 192, 224, CHUNK)  # what more rows are filled up to
SOME = (LEAST, FEW, 64, CHUNK)
# Inputs and outputs of linears that show how kernels sum, and numbers of rows that are compared.
TRIED = ((1536, 576, (LEAST, 4, 8, FEW, *MANY)), (4096, 256, SOME), (8192, 128, SOME))


def linears(
    device: torch.device, dtype: torch.dtype, share: widened.Share = widened.in_turn
) -> AbstractContextManager[object]:
    """While this is open linears of a model of this dtype run in the way that is quick and the same for any rows."""
    if widened.pays(device, dtype):
        return widened.Widened(share)
    return AnyRows() if needed(device, dtype) else nullcontext()


def needed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `linear` is to take the place of torch's own for models of this dtype there."""
    return device.type == "cpu" and dtype == torch.float32 and _inner_pays(torch.get_num_threads())


@cache
def _inner_pays(threads: int) -> bool:
    """Whether oneDNN's inner product is there, and gives rows the same bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return _alike(threads)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False  # this torch has none for this CPU


def _alike(seed: int) -> bool:
    """Whether rows have the same bits among 2 and among more. Tried once, in some ten milliseconds a shape.

    All sums cancel: what is left of them is their rounding alone.
    """
    random = torch.Generator().manual_seed(seed)
    for inputs, outputs, counts in TRIED:
        order = torch.randperm(inputs, generator=random)
        half_RI, half_OI = (torch.randn(n, inputs // 2, generator=random) for n in (CHUNK, outputs))
        rows_RI = torch.cat([half_RI, -half_RI], 1)[:, order]
        weight_OI = torch.cat([half_OI, half_OI], 1)[:, order]
        found = _inner(rows_RI[:LEAST], weight_OI, None)
        if any(not torch.equal(_inner(rows_RI[:count], weight_OI, None)[:LEAST], found) for count in counts):
            return False
    return True


def linear(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of [..., I] rows; weights may have any strides. Contiguous, [..., O]."""
    count = rows.shape[:-1].numel()
    if LEAST <= count <= FEW or count in MANY:
        return _inner(rows, weight_OI, bias_O)
    rows_RI = rows.reshape(count, rows.shape[-1])
    if count <= CHUNK:
        filling = next(size for size in (LEAST, *MANY) if size > count) - count
        found_RO = _inner(nn.functional.pad(rows_RI, (0, 0, 0, filling)), weight_OI, bias_O)[:count]
    else:
        found_RO = rows.new_empty(count, len(weight_OI))
        for part_RI, out_RO in zip(rows_RI.split(CHUNK), found_RO.split(CHUNK), strict=True):
            out_RO.copy_(linear(part_RI, weight_OI, bias_O))
    return found_RO.view(*rows.shape[:-1], len(weight_OI))


def _inner(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """By oneDNN's inner product of no rows, or two and more: [..., O] of [..., I]."""
    if bias_O is not None and bias_O.stride(0) != 1:
        bias_O = bias_O.clone(memory_format=torch.contiguous_format)  # torch 2.13 reads it as if it were
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight_OI, bias_O, "none", [], "")
    return found


class AnyRowsLinear(nn.Linear):
    """A linear that computes so, unless its weight multiplies in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Products [..., O] of rows [..., I]."""
        way = linear if _plain(self.weight) else nn.functional.linear
        return way(input, self.weight, self.bias)


class AnyRowsConv1D(Conv1D):
    """The same of GPT-2's linear, whose weight is [I, O]."""

    def forward(self, x: Tensor) -> Tensor:
        """Products [..., O] of rows [..., I]."""
        return linear(x, self.weight.t(), self.bias) if _plain(self.weight) else super().forward(x)


CLASSES: dict[type, type] = {nn.Linear: AnyRowsLinear, Conv1D: AnyRowsConv1D}


def convert(model: PreTrainedModel, device: torch.device, share: widened.Share = widened.in_turn) -> bool:
    """Let the linears of a model compute as in `linears`; whether these were all of them. Harmless when repeated."""
    classes = widened.CLASSES if widened.pays(device, model.dtype) else CLASSES
    for module in every_module(model):
        if type(module) in classes:
            module.__class__ = classes[type(module)]
        if isinstance(module, widened.WidenedLinear | widened.WidenedConv1D):
            module.share = share
    others = (module for module in every_module(model) if isinstance(module, nn.Linear | Conv1D))
    return all(type(module) in classes.values() for module in (model.get_output_embeddings(), *others))


class AnyRows(TorchFunctionMode):
    """While active, every linear with plain weights in main memory runs so, whatever calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and _plain(args[1]):
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain(weight: Tensor) -> bool:
    """Whether these are float32 on the CPU as they are; weights of another type multiply in their own way."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_cpu and weight.dtype == torch.float32
