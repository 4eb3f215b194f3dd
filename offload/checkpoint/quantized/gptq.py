"""GPTQ in 2, 3, 4 or 8 bits, with or without an order of its groups. Imports no torch.

Of a weight X.weight [O, I]: X.qweight [I * bits / 32, O] and X.qzeros [G, O * bits / 32] in I32, X.scales [G, O], and
X.g_idx [I], the group of each input. The first version of the format stores each zero point less one, the second
(`checkpoint_format` gptq_v2) as it is.   O outputs   I inputs   G groups
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, damaged, order_of, settings_of, words_in
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight whose words hold codes of one output."""
    settings = settings_of(folder, ("gptq",))
    if settings is None:
        return
    version = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if version not in FORMATS:
        raise UnsupportedModel(
            f"{folder.path} is quantised with GPTQ in the format '{version}', which cannot be streamed.",
            f"It is checkpoint_format that says so. Streamed are {' and '.join(FORMATS)}.",
            "a version of the model in one of these, or the 16-bit one.",
        )
    named, size = settings.get("bits"), settings.get("group_size")
    likely = sorted(BITS, key=lambda bits: bits != named)
    for found in words_in(folder):
        (words, O), G = found.codes.shape, found.scales.shape[0]
        # Its own bits, which may differ from layer to layer, are those of its zero points; of few outputs several fit.
        bits = next((bits for bits in likely if found.zeros.shape == (G, -(-O * bits // 32))), 0)
        if not bits or found.scales.shape[1] != O or words * 32 % bits:
            raise found.misfit
        I = words * 32 // bits
        order = order_of(folder.entries, f"{found.prefix}.g_idx", found.name, I)
        # The last group may be smaller, if config.json says how large the others are.
        width = size if type(size) is int and size > 0 and -(-I // size) == G else max(1, I // G)
        if not order and -(-I // width) != G:
            raise damaged(found.name, f"'{found.scales.name}' has {G} groups for {I} inputs")
        members = found.members | order
        scheme = f"gptq_{bits}bit" if version == "gptq" else f"gptq_v2_{bits}bit"
        yield Quantised(found.name, scheme, (O, I), members, block=(1, width), bits=bits)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale, from words that hold neighbouring inputs of one output."""
    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks, of_outputs, outputs_apart, unpacked

    (_, I), bits, words = weight.shape, weight.bits, members["codes"]
    stored, less = of_outputs(members["zeros"], bits), 0 if weight.scheme.startswith("gptq_v2") else 1

    def values(rows: slice) -> Tensor:
        return unpacked(words[:, rows].t(), bits, I).float()

    def zeros(rows: slice) -> Tensor:
        return (stored(rows) + less) & (2**bits - 1)

    order, step = members.get("order"), outputs_apart(bits)
    fill_blocks(target, values, members["scales"].t(), weight.block, zeros, order, step)


SPEEDS = {f"{version}_{bits}bit": "int8" if bits == 8 else "nf4" for version in FORMATS for bits in BITS}
FORMAT = StoredFormat("GPTQ", ("gptq",), find, dequantise, SPEEDS)
