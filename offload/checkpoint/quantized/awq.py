"""AWQ in its gemm layout: 4 bits, eight outputs a word, in an order of their own. Imports no torch.

Of a weight X.weight [O, I]: X.qweight [I, O / 8] and X.qzeros [G, O / 8] in I32, X.scales [G, O].
O outputs   I inputs   G groups
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.weight import Quantised, StoredFormat, settings_of, words_in
from offload.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

# Which of a word's eight places holds output 0, 1, 2 …
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
EACH = 8


def find(folder: Folder) -> Iterator[Quantised]:
    """Each weight in words of eight outputs."""
    settings = settings_of(folder, ("awq",))
    if settings is None:
        return
    layout, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", 4))
    if layout != "gemm" or bits != 4:
        raise UnsupportedModel(
            f"{folder.path} is quantised with AWQ in {bits} bits and the layout '{layout}', which cannot be streamed.",
            "They are bits and version of quantization_config. Streamed is 'gemm' in 4 bits.",
            "a version of the model in that layout (most are), or the 16-bit one.",
        )
    for found in words_in(folder):
        (I, words), (G, O) = found.codes.shape, found.scales.shape
        if words * EACH != O or I % G or found.zeros.shape != (G, words):
            raise found.misfit
        yield Quantised(found.name, "awq", (O, I), found.members, block=(1, I // G), bits=4)


def dequantise(weight: Quantised, members: Mapping[str, Tensor], target: Tensor) -> None:
    """(code - zero) * scale, from words that hold eight outputs of one input."""
    import torch

    from offload.checkpoint.quantized.arithmetic.blocks import fill_blocks

    shifts = torch.tensor([4 * place for place in PLACES], dtype=torch.int32, device=target.device)

    def codes_of(words_IW: Tensor) -> Tensor:
        """Codes [8 W, I] of words [I, W]."""
        return ((words_IW[..., None] >> shifts) & 15).flatten(1).t()

    def of(role: str) -> Callable[[slice], Tensor]:
        words = members[role]
        return lambda rows: codes_of(words[:, rows.start // EACH : rows.stop // EACH]).float()

    fill_blocks(target, of("codes"), members["scales"].t(), weight.block, of("zeros"), step=EACH)


FORMAT = StoredFormat("AWQ", ("awq",), find, dequantise, {"awq": "nf4"})
