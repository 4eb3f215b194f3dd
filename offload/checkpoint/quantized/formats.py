"""The quantised formats that can be read, one file and one line each. Knows no tensor, no file and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from offload.checkpoint.quantized.weight import Quantised, Scheme, StoredFormat

if TYPE_CHECKING:
    from torch import Tensor

# Files of this folder, each of which says all about its format as FORMAT.
_FILES = (
    "gguf",
    "bitsandbytes_4bit",
    "int8",
    "int4",
    "mxfp4",
    "fp8",
    "fp4",
    "compressed_tensors",
    "awq",
    "gptq",
    "mlx",
    "torchao",
    "hqq",
)
FORMATS: tuple[StoredFormat, ...] = tuple(resolve_name(f"{__package__}.{file}:FORMAT") for file in _FILES)
BY_SCHEME: Mapping[Scheme, StoredFormat] = {scheme: one for one in FORMATS for scheme in one.speeds}
# What config.json may name; the tensors themselves say the rest.
METHODS = ("specexec", *dict.fromkeys(method for one in FORMATS for method in one.methods))


def foreign(schemes: Iterable[Scheme]) -> str | None:
    """Why plain transformers loads no folder of weights in these schemes; None where it does."""
    return next((why for scheme in schemes if scheme in BY_SCHEME and (why := BY_SCHEME[scheme].foreign)), None)


def computes_as_stored(scheme: Scheme) -> bool:
    """Whether a matrix in this scheme can be multiplied in integers, as it is stored."""
    return scheme in BY_SCHEME and BY_SCHEME[scheme].as_stored is not None


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """Fill `target`, a view of the weight's shape in the compute dtype, from the members by role."""
    BY_SCHEME[weight.scheme].dequantise(weight, members, target)
