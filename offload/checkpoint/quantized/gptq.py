"""GPTQ in 2, 3, 4 or 8 bits, with or without an order of its groups. Imports no torch.

Of a weight X.weight [O, I]: X.qweight [I * bits / 32, O] and X.qzeros [G, O * bits / 32] in I32, X.scales [G, O], and
X.g_idx [I], the group of each input. The first version of the format stores each zero point less one, the second
(`checkpoint_format` gptq_v2) as it is.   O outputs   I inputs   G groups
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, damaged, member, settings_of
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
            f"Streamed are {' and '.join(FORMATS)}.",
            "a version of the model in one of these, or the 16-bit one.",
        )
    entries = folder.entries
    for name, codes in entries.items():
        prefix, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        base = f"{prefix}.weight"
        scales, zeros = member(entries, f"{prefix}.scales", base), member(entries, f"{prefix}.qzeros", base)
        order = entries.get(f"{prefix}.g_idx")
        if len(codes.shape) != 2 or len(scales.shape) != 2 or not codes.nbytes or not scales.nbytes:
            raise damaged(base, f"'{name}' is {list(codes.shape)} and '{scales.name}' {list(scales.shape)}")
        (words, O), G = codes.shape, scales.shape[0]
        # Its own bits, which may differ from layer to layer, are those of its zero points.
        bits = next((bits for bits in BITS if zeros.shape == (G, -(-O * bits // 32))), 0)
        I = words * 32 // bits if bits else 0
        sound = (codes.dtype, zeros.dtype) == ("I32", "I32") and scales.dtype in ("F16", "BF16", "F32")
        if not sound or not bits or scales.shape[1] != O or words * 32 % bits:
            raise damaged(
                base, f"'{name}' {list(codes.shape)}, '{zeros.name}' {list(zeros.shape)} and '{scales.name}' "
                f"{list(scales.shape)} do not fit each other"
            )  # fmt: skip
        if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (I,)):
            raise damaged(base, f"'{order.name}' is {order.dtype} {list(order.shape)} for {I} inputs")
        members = {"codes": codes, "scales": scales, "zeros": zeros} | ({"order": order} if order else {})
        scheme = f"gptq_{bits}bit" if version == "gptq" else f"gptq_v2_{bits}bit"
        yield Quantised(base, scheme, (O, I), members, block=(1, -(-I // G)), bits=bits)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale, from words that hold neighbouring inputs of one output."""
    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks, unpacked

    (O, I), bits, words = weight.shape, weight.bits, members["codes"]
    zeros = unpacked(members["zeros"], bits, O).t()
    if not weight.scheme.startswith("gptq_v2"):
        zeros = (zeros + 1) & (2**bits - 1)

    def values(rows: slice) -> Tensor:
        return unpacked(words[:, rows].t(), bits, I).float()

    fill_blocks(target, values, members["scales"].t(), weight.block, zeros, members.get("order"))


SPEEDS = {f"{version}_{bits}bit": "int8" if bits == 8 else "nf4" for version in FORMATS for bits in BITS}
FORMAT = StoredFormat("GPTQ", ("gptq",), find, dequantise, SPEEDS)
