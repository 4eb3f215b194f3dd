"""bitsandbytes' 4 bits: NF4 or FP4 in blocks, whose scales may be quantised themselves. Imports no torch.

Of a weight X: X, X.absmax, X.quant_map, X.nested_absmax, X.nested_quant_map, X.quant_state.bitsandbytes__nf4. A stack
of experts in one tensor is held the same way, with the state X.quant_state.specexec__nf4 (docs/packs.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_small
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, check_sizes, damaged, member

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state."
OWNERS = ("bitsandbytes__nf4", "bitsandbytes__fp4", "specexec__nf4")
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def find(folder: Folder) -> Iterator[Quantised]:
    """Weights in bitsandbytes' 4 bits; where the files are elsewhere, states cannot be read and shapes are guessed."""
    entries, columns = folder.entries, folder.config.get("hidden_size")
    width = None if folder.here else columns if isinstance(columns, int) and columns > 0 else 1
    for name, entry in entries.items():
        base, found, owner = name.partition(STATE)
        if not found or owner not in OWNERS:
            continue
        members = {"codes": member(entries, base, base), "other": entry}
        for role in ("absmax", "nested_absmax", "nested_quant_map", "quant_map"):
            if f"{base}.{role}" in entries:
                members[role] = entries[f"{base}.{role}"]
        member(entries, f"{base}.absmax", base)
        state = _state(entry) if width is None else _usual_state(owner, members, width)
        yield _from_state(base, owner, members, state)


def _state(entry: Entry) -> dict[str, object]:
    try:
        state = json.loads(read_small(entry))
    except ValueError as error:
        raise damaged(entry.name, f"its state is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise damaged(entry.name, "its state is not a JSON object")
    return cast("dict[str, object]", state)


def _usual_state(owner: str, members: Mapping[str, Entry], width: int) -> dict[str, object]:
    """What a state says of a matrix with so many codes, as bitsandbytes writes it; its rows are guessed."""
    codes, nested = members["codes"], "nested_absmax" in members
    stack = list(codes.shape[:1]) if owner.startswith("specexec") else []
    each = 2 * codes.nbytes // max(1, math.prod(stack))
    columns = width if each % width == 0 else 1
    offsets = [0.0] * math.prod(stack) if nested else []
    return {
        "shape": [*stack, each // columns, columns], "blocksize": 64, "nested_blocksize": 256, "dtype": "bfloat16",
        "quant_type": owner.partition("__")[2], "nested_offset": offsets,
    }  # fmt: skip


def _from_state(base: str, owner: str, members: Mapping[str, Entry], state: Mapping[str, object]) -> Quantised:
    nested = "nested_absmax" in members
    offsets = state.get("nested_offset", [])
    offsets = offsets if isinstance(offsets, list) else [offsets]
    shape, sizes = state.get("shape"), (state.get("blocksize"), state.get("nested_blocksize", 256))
    sound = (
        isinstance(shape, list)
        and all(type(number) is int and number > 0 for number in (*shape, *sizes))
        and all(isinstance(offset, float) for offset in offsets)
        and state.get("dtype") in FLOATS
        and state.get("quant_type") == owner.partition("__")[2]
        and ("nested_quant_map" in members) == nested == bool(offsets)
    )
    if not sound:
        raise damaged(base, "its quantisation state makes no sense")
    dense = tuple(cast("list[int]", shape))
    weight = Quantised(
        name=base,
        scheme="nf4" if owner.endswith("nf4") else "fp4",
        shape=dense,
        members=members,
        dtype=FLOATS[str(state["dtype"])],
        blocksize=cast("int", sizes[0]),
        nested_blocksize=cast("int", sizes[1]),
        matrices=dense[0] if owner.startswith("specexec") else 1,
        offsets=tuple(cast("list[float]", offsets)),
    )
    stacked = weight.matrices
    each = math.prod(weight.shape) // stacked
    blocks = -(-each // weight.blocksize)
    wanted = {"codes": stacked * (-(-each // 2)), "absmax": stacked * blocks * (1 if nested else 4)}
    if nested:
        wanted |= {"nested_absmax": stacked * -(-blocks // weight.nested_blocksize) * 4, "nested_quant_map": 1024}
    check_sizes(weight, wanted)
    for role, kind in {"absmax": "U8" if nested else "F32", "nested_absmax": "F32", "nested_quant_map": "F32"}.items():
        if role in members and members[role].dtype != kind:
            raise damaged(base, f"'{members[role].name}' is {members[role].dtype}, {kind} was expected")
    if nested and len(offsets) != stacked:
        raise damaged(base, f"it has {len(offsets)} offsets for {stacked} matrices")
    return weight


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """NF4 or FP4 in blocks, whose scales may be quantised themselves."""
    import torch

    from offload.checkpoint.quantized.quantize import bitsandbytes

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
        _fill(weight, codes[index], scales, matrix)


def _fill(weight: Quantised, codes: Tensor, scales: Tensor, matrix: Tensor) -> None:
    import torch

    from offload.checkpoint.quantized.arithmetic.pieces import fill_each, piece_B
    from offload.checkpoint.quantized.quantize import bitsandbytes
    from offload.checkpoint.tensors import DTYPES

    functional, stored = bitsandbytes(), DTYPES[weight.dtype]
    if matrix.is_contiguous() and not matrix.is_cpu and matrix.dtype == stored:
        functional.dequantize_4bit(
            codes[:, None], absmax=scales, out=matrix, blocksize=weight.blocksize, quant_type=weight.scheme
        )
        return
    flat = matrix.view(-1) if matrix.is_contiguous() else matrix.new_empty(matrix.numel())
    step = piece_B(matrix) // stored.itemsize

    def fill(run: tuple[int, int]) -> None:
        start, length = run
        state = functional.QuantState(
            absmax=scales[start // weight.blocksize : -(-(start + length) // weight.blocksize)],
            # As rows of one block: bitsandbytes 0.50 reads wrong scales on the CPU where rows are no whole blocks.
            # For a row of odd length it would first compile a kernel, in some 20 s; a byte holds two codes in any case.
            shape=torch.Size((-(-length // weight.blocksize), min(length + length % 2, weight.blocksize))),
            blocksize=weight.blocksize,
            quant_type=weight.scheme,
            dtype=stored,
        )
        dense = functional.dequantize_4bit(codes[start // 2 : -(-(start + length) // 2)], state)
        flat[start : start + length].copy_(dense.view(-1)[:length])

    fill_each(fill, _block_runs(matrix.numel(), weight.blocksize, step), matrix)
    if not matrix.is_contiguous():
        matrix.copy_(flat.view(matrix.shape))


def _block_runs(count: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and length of runs of whole blocks, and last of what is less than a block."""
    whole, step = count - count % block, max(most - most % block, block)
    for start in range(0, whole, step):
        yield start, min(step, whole - start)
    if whole < count:
        yield whole, count - whole


FORMAT = StoredFormat("bitsandbytes 4 bit", ("bitsandbytes",), find, dequantise, {"nf4": "nf4", "fp4": "nf4"})
