"""MLX's groups of 2 to 8 bits: code * scale + bias. Imports no torch.

Of a weight X.weight [O, I]: X.weight in U32 [O, I * bits / 32], X.scales and X.biases [O, G]. Embeddings and heads may
be stored so too.   O outputs   I inputs   G groups
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import FLOATS, Quantised, StoredFormat, damaged, member, settings_of
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "MLX"
# Architectures whose tensors keep their names and values in mlx-lm.
SAME = ("llama", "mistral", "qwen2", "qwen3")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in words of codes."""
    settings = settings_of(folder, (METHOD,))
    if settings is None:
        return
    if settings.get("mode", "affine") != "affine":
        raise UnsupportedModel(
            f"{folder.path} is quantised with MLX in its mode '{settings['mode']}', which cannot be streamed.",
            "Streamed is the mode 'affine'.",
            "a version of the model in that mode (most are), or the 16-bit one.",
        )
    if folder.model_type not in SAME:
        raise UnsupportedModel(
            f"{folder.path} is quantised with MLX, which changes names or values of a {folder.model_type} model.",
            f"It is model_type that says so. Streamed are {', '.join(SAME)}.",
            "another quantised version of the model, or the 16-bit one.",
        )
    entries = folder.entries
    for name, codes in entries.items():
        prefix, _, last = name.rpartition(".")
        if last != "weight" or codes.dtype != "U32":
            continue
        scales, biases = member(entries, f"{prefix}.scales", name), member(entries, f"{prefix}.biases", name)
        own = settings.get(prefix)
        given = own if isinstance(own, dict) else settings
        bits, group = given.get("bits"), given.get("group_size")
        if bits not in BITS or group not in GROUPS or len(codes.shape) != 2 or not codes.nbytes:
            raise damaged(name, f"it is {list(codes.shape)}, in {bits} bits and groups of {group} by config.json")
        assert isinstance(bits, int)
        assert isinstance(group, int)
        O, words = codes.shape
        I = words * 32 // bits
        whole = not words * 32 % bits and not I % group and scales.shape == biases.shape == (O, I // group)
        if not whole or scales.dtype not in FLOATS or scales.dtype != biases.dtype:
            raise damaged(
                name, f"'{scales.name}' {list(scales.shape)} and '{biases.name}' {list(biases.shape)} do not fit "
                f"{list(codes.shape)} in {bits} bits and groups of {group}"
            )  # fmt: skip
        members = {"codes": codes, "scales": scales, "biases": biases}
        yield Quantised(name, f"mlx_{bits}bit", (O, I), members, block=(1, group), bits=bits)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """As MLX computes on a CPU: product and sum are each rounded to the dtype of the scales."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import fill_rows, unpacked

    I, (_, group), kind = weight.shape[-1], weight.block, members["scales"].dtype
    codes = members["codes"].view(torch.int32)
    scales, biases = (members[role].float()[..., None] for role in ("scales", "biases"))

    def values(rows: slice) -> Tensor:
        grouped = unpacked(codes[rows], weight.bits, I).float().unflatten(1, (-1, group))
        return grouped.mul_(scales[rows]).to(kind).float().add_(biases[rows]).to(kind).flatten(1)

    fill_rows(target, values)


FORMAT = StoredFormat(
    "MLX", (METHOD,), find, dequantise, {f"mlx_{bits}bit": "int8" if bits == 8 else "nf4" for bits in BITS},
    "its weights are in MLX's layout",
)  # fmt: skip
