"""The tensors of a GGUF model under the names of a transformers checkpoint, with what has to be undone behind them.

A plain tensor that the converter only renamed keeps its plain name. Every other is called

    NAME.gguf.TYPE          blocks of one of ggml's types, such as model.layers.0.mlp.up_proj.weight.gguf.Q4_K
    NAME.gguf.TYPE.UNDO     the same, and values that the converter changed: pairs9, plus1

so that a name says all that is needed to compute the weight, in this file and in a pack made from it.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from offload.checkpoint.entry import Entry
from offload.checkpoint.gguf.architectures import DESCRIPTIONS, OUTSIDE, Architecture, architecture_of
from offload.checkpoint.gguf.facts import GgufFacts
from offload.checkpoint.gguf.header import GgufHeader, GgufTensor


def tensors_of(header: GgufHeader, facts: GgufFacts) -> Iterator[Entry]:
    """The tensors of one file of the model, one expert's part by itself; blocks of few bits are bytes, row by row.

    Raises UnsupportedModel for those that the architecture does not know.
    """
    found = architecture_of(facts)
    for tensor in header.tensors:
        if tensor.name in DESCRIPTIONS:
            continue
        name, undo = _renamed(tensor, found, facts)
        single = len(tensor.shape) == 1 and tensor.name.endswith("ffn_gate_inp_shexp.weight")
        shape = (1, *tensor.shape) if single else tensor.shape
        if "*" not in name:
            yield _stored(name, undo, tensor, header.file, shape, tensor.offset)
            continue
        each_B = tensor.nbytes // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            one = name.replace("*", str(expert))
            yield _stored(one, undo, tensor, header.file, shape[1:], tensor.offset + expert * each_B)


def _renamed(tensor: GgufTensor, found: Architecture, facts: GgufFacts) -> tuple[str, str]:
    """The name in a checkpoint, and what is to be undone or nothing."""
    path, _, suffix = tensor.name.rpartition(".")
    block, _, short = path.rpartition(".")
    known = found.names.get(short) if block.startswith("blk.") else OUTSIDE.get(path)
    if known is None or suffix not in ("weight", "bias"):
        raise facts.refuse(f"holds the tensor '{tensor.name}', which {found.model_class} has no place for")
    if "*" in known and (len(tensor.shape) < 2 or tensor.shape[0] != facts.count("expert_count")):
        raise facts.refuse(f"holds '{tensor.name}' {list(tensor.shape)} and has {facts.count('expert_count')} experts")
    layer = block.removeprefix("blk.")
    return (f"model.layers.{layer}.{known}" if block else known) + f".{suffix}", _undo(short, found, facts)


def _undo(short: str, found: Architecture, facts: GgufFacts) -> str:
    heads = facts.count("attention.head_count")
    if found.pairs and short in ("attn_q", "attn_k"):
        return f"pairs{heads if short == 'attn_q' else facts.count('attention.head_count_kv', heads)}"
    return "plus1" if found.norms_plus_1 and short.endswith("norm") else ""


def _stored(name: str, undo: str, tensor: GgufTensor, file: Path, shape: tuple[int, ...], offset: int) -> Entry:
    kind = tensor.kind
    nbytes = math.prod(shape) // kind.items * kind.nbytes
    if kind.plain and not undo:
        return Entry(name, file, offset, nbytes, kind.plain, shape)
    name = f"{name}.gguf.{kind.name}" + (f".{undo}" if undo else "")
    if kind.plain:
        return Entry(name, file, offset, nbytes, kind.plain, shape)
    return Entry(name, file, offset, nbytes, "U8", (*shape[:-1], shape[-1] // kind.items * kind.nbytes))
