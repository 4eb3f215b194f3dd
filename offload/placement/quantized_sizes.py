"""What a model would take in fewer bits, from its headers alone. Knows no torch and quantises nothing.

The sizes are those of our packs: the layers' matrices in NF4 with double quantisation, int4 or int8, the rest as is.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder
from offload.checkpoint.mtp import mtp_folder
from offload.checkpoint.quantized import int4
from offload.checkpoint.quantized.formats import BY_SCHEME
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.quantized.weight import SCALE_COPIES
from offload.checkpoint.roles import LAYER, part_of
from offload.checkpoint.routing import routing_of
from offload.errors import UnsupportedModel
from offload.placement.forecast import Work
from offload.placement.placement import RING, Need
from offload.placement.requirements import EXPERTS, FLOATS, Compute, few_bit_head, in_integers, need_of, passing_B

Format = Literal["none", "int8", "int4", "nf4"]
FourBits = Literal["none", "nf4"]
FewBits = Literal["none", "nf4", "hqq4", "hqq3", "hqq2"]
# Of a weight that drafts, scales included.
BITS: Mapping[FewBits, float] = {"nf4": 4.5, "hqq4": 4.5, "hqq3": 3.7, "hqq2": 2.5}
FORMATS: tuple[Format, ...] = ("none", "int8", "int4", "nf4")
# Of recurrent layers: short filters and rates of decay are no matrices, whatever their shape.
WHOLE = re.compile(r"(conv1d|\.conv\.conv)\.weight$|\.A_log$")
# Of each NF4 matrix: two tables and a state; of every 64 weights one byte of scale, of every 256 scales one float.
NF4_STATE_B, NF4_BLOCK, NF4_NESTED = 1024 + 64 + 256, 64, 256


def is_quantised(folder: Folder) -> bool:
    """Does the checkpoint hold few bits already?"""
    return bool(folder.config.get("quantization_config"))


def need_in(
    folder: Folder,
    form: Format,
    item_B: int,
    ctx: int,
    beside_B: Mapping[str, int] | None = None,
    compute: Compute = "float",
) -> Need:
    """The need of the folder after packing it so; `none` is as it is."""
    plain = need_of(folder, item_B, ctx, beside_B, compute)
    if form == "none":
        return plain
    saved: dict[int, int] = {}
    dense: dict[int, int] = {}
    read: dict[int, int] = {}
    matrices = _matrices(folder, len(plain.layers_B), form)
    for layer, entry in matrices:
        dense_B, packed_B = math.prod(entry.shape) * item_B, packed_size_B(entry, form)
        if not in_integers(compute, form, entry.name, entry.shape):
            dense[layer] = dense.get(layer, 0) + dense_B
        saved[layer] = saved.get(layer, 0) + dense_B - packed_B
        read[layer] = read.get(layer, 0) + entry.nbytes - packed_B
    return replace(
        plain,
        layers_B=tuple(size_B - saved.get(layer, 0) for layer, size_B in enumerate(plain.layers_B)),
        read_B=tuple(size_B - read.get(layer, 0) for layer, size_B in enumerate(plain.read_B)),
        dense_B=max(dense.values(), default=0),
        passing_B=passing_B((entry.shape for _, entry in matrices), (_tables_B(entry, form) for _, entry in matrices)),
    )


def with_head(folder: Folder, need: Need, form: FourBits, item_B: int) -> Need:
    """The need with the head in that format, whatever the layers are in.

    Raises UnsupportedModel where the head has few bits already.
    """
    if form == "none":
        return need
    if few := [name for name in fold(folder).quantised if not LAYER.search(name) and part_of(name) == "head"]:
        raise UnsupportedModel(
            f"{folder.path} keeps its head in few bits already ('{few[0]}'): --head-quant has nothing to do.",
            hint="leave --head-quant out, or the 16-bit version of the model.",
        )
    outside = [entry for entry in folder.entries.values() if not LAYER.search(entry.name) and len(entry.shape) == 2]
    order = ("lookups", "norms", "embeddings", "head")  # tied: the embeddings are the head; some go by another name
    V, H = max(outside, key=lambda entry: (order.index(part_of(entry.name)), entry.shape[0])).shape
    return few_bit_head(need, (V, H), item_B)


def resident_B(folder: Folder, form: FewBits, item_B: int, ctx: int, *, on_gpu: bool = False) -> int:
    """A whole model in memory; in few bits its layers are quantised while it is loaded: those, and a ring."""
    need = need_of(folder, item_B, ctx)
    if form == "none":
        return need.resident_B + (need.passing_B if on_gpu else 0)
    layers_B = sum(need.layers_B)
    return need.resident_B - layers_B + int(layers_B * BITS[form] / (8 * item_B)) + RING * need.widest_B


def copy_B(folder: Folder, form: FewBits, item_B: int) -> tuple[int, int]:
    """All layers once more, their matrices in few bits however they are stored; and the widest one, dense."""
    folded, layers = fold(folder), len(need_of(folder, item_B, 1).layers_B)
    whole_B, small_B = [0] * layers, 0
    shapes = [(one.name, one.shape) for one in folded.dense.values()]
    shapes += [(one.name, one.shape) for one in folded.quantised.values()]
    for name, shape in shapes:
        match = LAYER.search(name)
        if match and int(match[1]) < layers:
            weights = math.prod(shape)
            whole_B[int(match[1])] += weights * item_B
            small = len(shape) > 1 and not WHOLE.search(name)
            small_B += int(weights * BITS[form] / 8) if small else weights * item_B
    return small_B, max(whole_B)


def mtp_B(folder: Folder, item_B: int) -> int:
    """The layer that guesses further ahead, dense in memory however it is stored; 0 where none is known."""
    folded = fold(mtp_folder(folder))
    shapes = [one.shape for one in folded.dense.values()] + [one.shape for one in folded.quantised.values()]
    return sum(-(-math.prod(shape) * item_B // 64) * 64 for shape in shapes)


def looked_up_B(folder: Folder, form: FewBits, item_B: int) -> int:
    """The part of `resident_B` that stays in RAM beside a GPU: embeddings that are not the head too, if left whole."""
    need = need_of(folder, item_B, 0)
    return need.lookups_B + (need.embeddings_B if form == "none" and need.head_B else 0)


def work_of(folder: Folder, form: Format, item_B: int, head: FourBits = "none", compute: Compute = "float") -> Work:
    """What a sweep multiplies: every matrix but the embeddings, and the head."""
    plain = need_of(folder, item_B, 1)
    head_B = plain.head_B or plain.embeddings_B  # tied: the embeddings are the head
    folded = fold(folder)
    shapes = {entry.name: entry.shape for _, entry in _matrices(folder, len(plain.layers_B), form)}
    unpacked_B: dict[str, int] = {}
    few_bits_B: dict[str, int] = {}  # experts among them
    codes_B = whole_numbers = expanded_B = 0
    for weight in folded.quantised.values():
        match = LAYER.search(weight.name)
        if match and int(match[1]) < len(plain.layers_B):
            codes_B += weight.nbytes
            if in_integers(compute, weight.scheme, weight.name, weight.shape):
                whole_numbers += math.prod(weight.shape)
                expanded_B += math.prod(weight.shape) if weight.scheme == "int4" else 0
                continue
            scheme = BY_SCHEME[weight.scheme].speeds[weight.scheme]
            dense_B = math.prod(weight.shape) * item_B
            unpacked_B[scheme] = unpacked_B.get(scheme, 0) + dense_B
            if EXPERTS in weight.name:
                few_bits_B[scheme] = few_bits_B.get(scheme, 0) + dense_B
            shapes[weight.name] = weight.shape
    layers_B = sum(plain.layers_B) - codes_B + sum(unpacked_B.values())
    if form != "none":
        linears = {name for name, shape in shapes.items() if in_integers(compute, form, name, shape)}
        popped = sum(math.prod(shapes.pop(name)) for name in linears)
        whole_numbers += popped
        expanded_B += popped if form == "int4" else 0
        layers_B = sum(math.prod(shape) for shape in shapes.values()) * item_B
        unpacked_B = {form: layers_B}
    stored = [
        one
        for one in folded.quantised.values()
        if one.stays and not LAYER.search(one.name) and part_of(one.name) == "head"
    ]
    if stored:
        head, head_B = "nf4", math.prod(stored[0].shape) * item_B
    if head != "none":
        unpacked_B[head] = unpacked_B.get(head, 0) + head_B
    if expanded_B:  # to a byte each, of which twice as many are made in a second as of weights in 16 bits
        unpacked_B["int4"] = unpacked_B.get("int4", 0) + expanded_B
    experts_B = sum(math.prod(shape) for name, shape in shapes.items() if EXPERTS in name) * item_B
    routing = routing_of(folder.config)
    if not experts_B or routing is None:
        return Work(layers_B + head_B, item_B, unpacked_B, whole_numbers=whole_numbers)
    if form != "none":
        few_bits_B = {form: experts_B}
    share = _experts_share(folder, form, item_B)
    return Work(layers_B + head_B, item_B, unpacked_B, experts_B, routing, share, few_bits_B, whole_numbers)


def _experts_share(folder: Folder, form: Format, item_B: int) -> float:
    """The experts' part of the bytes that travel."""
    need = need_in(folder, form, item_B, 1)
    if form == "none":
        held_B = [entry.nbytes for entry in folder.entries.values() if EXPERTS in entry.name]
    else:
        matrices = _matrices(folder, len(need.layers_B), form)
        held_B = [packed_size_B(entry, form) for _, entry in matrices if EXPERTS in entry.name]
    return min(sum(held_B) / max(need.disk_B, 1), 1.0)


def packed_size_B(entry: Entry, form: Format) -> int:
    """Bytes of one matrix in few bits."""
    count = math.prod(entry.shape)
    if form == "int8":
        return count + count // entry.shape[-1] * 4
    if form == "int4":
        return int4.size_B(entry.shape)
    scales = -(-count // NF4_BLOCK)
    return -(-count // 2) + scales + -(-scales // NF4_NESTED) * 4 + NF4_STATE_B


def _tables_B(entry: Entry, form: Format) -> int:
    """`Quantised.tables_B` of one matrix in few bits."""
    rows = math.prod(entry.shape[:-1])
    blocks = -(-math.prod(entry.shape) // NF4_BLOCK)
    return 4 * SCALE_COPIES * (blocks + -(-blocks // NF4_NESTED) if form == "nf4" else rows)


def _matrices(folder: Folder, layers: int, form: Format) -> list[tuple[int, Entry]]:
    found = []
    for entry in folder.entries.values():
        match = LAYER.search(entry.name)
        whole = WHOLE.search(entry.name) or (form == "int4" and not int4.fits(entry.shape))
        if match and int(match[1]) < layers and len(entry.shape) > 1 and entry.dtype in FLOATS and not whole:
            found.append((int(match[1]), entry))
    return found
