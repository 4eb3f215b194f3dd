"""The tensors of a GGUF model under the names of a transformers checkpoint, with what has to be undone behind them.

A plain tensor that the converter only renamed keeps its plain name. Every other is called

    NAME.gguf.TYPE          blocks of one of ggml's types, such as model.layers.0.mlp.up_proj.weight.gguf.Q4_K
    NAME.gguf.TYPE.UNDO     the same, and values that the converter changed: plus1, log

where NAME may end with a place (entry.py), if it holds a part of the module's tensor or has it in another order: so
that a name says all that is needed to compute the weight, in this file and in a pack made from it.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from offload.checkpoint.entry import Entry, Strides, placed
from offload.checkpoint.gguf.architectures import DESCRIPTIONS, OUTSIDE, Architecture, architecture_of
from offload.checkpoint.gguf.facts import GgufFacts
from offload.checkpoint.gguf.header import GgufHeader, GgufTensor


def tensors_of(header: GgufHeader, facts: GgufFacts) -> Iterator[Entry]:
    """The tensors of one file of the model, one expert's part by itself; blocks of few bits are bytes, row by row.

    Layers that guess further ahead are left out. Raises UnsupportedModel for tensors that the architecture does not
    know, CorruptShard for those that are not as the header says.
    """
    found = architecture_of(facts)
    layers = facts.layers
    for tensor in header.tensors:
        block, _ = _inside(tensor.name)
        if tensor.name in DESCRIPTIONS or (block and int(block) >= layers):
            continue
        name, undo = _renamed(tensor, found, facts), found.undo(tensor.name)
        stored = Entry(name, header.file, tensor.offset, tensor.nbytes, "", tensor.shape)
        for one in _cut(stored, tensor, found, facts):
            yield _stored(one, undo, tensor)


def _renamed(tensor: GgufTensor, found: Architecture, facts: GgufFacts) -> str:
    """The name in a checkpoint."""
    block, inside = _inside(tensor.name)
    known = found.names if block else OUTSIDE
    start = f"model.layers.{block}." if block else ""
    path, _, suffix = inside.rpartition(".")
    if inside in known:
        return start + known[inside]
    if path in known and suffix in ("weight", "bias"):
        return f"{start}{known[path]}.{suffix}"
    raise facts.refuse(f"holds the tensor '{tensor.name}', which {found.model_class} has no place for")


def _inside(name: str) -> tuple[str, str]:
    """The number of a block, or nothing, and the name inside of it."""
    first, _, rest = name.partition(".")
    block, _, inside = rest.partition(".")
    return (block, inside) if first == "blk" and inside else ("", name)


def _cut(stored: Entry, tensor: GgufTensor, found: Architecture, facts: GgufFacts) -> Iterator[Entry]:
    """The stored tensor in pieces that each have one place in a tensor of the module, with their names and shapes."""
    _, inside = _inside(tensor.name)
    if "*" in stored.name:  # every expert by itself
        if len(tensor.shape) < 2 or tensor.shape[0] != facts.count("expert_count"):
            raise facts.refuse(f"holds '{tensor.name}' {list(tensor.shape)} of {facts.count('expert_count')} experts")
        for expert in range(tensor.shape[0]):
            one = stored.rows(expert, 1)
            yield replace(one, name=stored.name.replace("*", str(expert)), shape=one.shape[1:])
        return
    order = found.orders.get(inside)
    if order is not None:
        yield from _placed(stored, order(facts, tensor.shape), tensor, facts)
    elif inside == "ffn_gate_inp_shexp.weight" and len(tensor.shape) == 1:
        yield replace(stored, shape=(1, *tensor.shape))
    elif inside == "ssm_conv1d.weight":
        yield replace(stored, shape=(tensor.shape[0], 1, *tensor.shape[1:]))
    else:
        yield stored


def _placed(stored: Entry, places: list[Strides], tensor: GgufTensor, facts: GgufFacts) -> Iterator[Entry]:
    """So many items for each place, one after another; only whole rows, since blocks lie inside of rows."""
    columns, start = tensor.shape[-1] if len(tensor.shape) > 1 else 1, 0
    flat = replace(stored, shape=(math.prod(tensor.shape) // columns, columns))
    for place in places:
        facts.divides(columns, place.items, "items of a tensor")
        rows = place.items // columns
        yield replace(flat.rows(start, rows), name=place.behind(stored.name), shape=place.sizes)
        start += rows
    if start != flat.shape[0]:
        raise facts.refuse(f"holds '{tensor.name}' {list(tensor.shape)}, which its other fields do not allow")


def _stored(one: Entry, undo: str, tensor: GgufTensor) -> Entry:
    kind = tensor.kind
    if kind.plain:
        return replace(one, name=f"{one.name}.gguf.{kind.name}.{undo}" if undo else one.name, dtype=kind.plain)
    name, row_B = f"{one.name}.gguf.{kind.name}" + (f".{undo}" if undo else ""), _row_B(tensor)
    _, place = placed(one.name)
    if place is None:
        rows = one.shape[:-1]
    else:
        rows = tensor.shape[:-1] if one.nbytes == tensor.nbytes else (one.nbytes // row_B,)
    return replace(one, name=name, dtype="U8", shape=(*rows, row_B))


def _row_B(tensor: GgufTensor) -> int:
    return tensor.shape[-1] // tensor.kind.items * tensor.kind.nbytes
