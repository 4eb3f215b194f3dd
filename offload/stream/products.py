"""What adapters add to the weights of a block: W + s * (B @ A) in float32, rounded once. Knows no file and no adapter.

The sum is made where the weight computes and some rows at a time, always as many, so every placement has the same bits.
R rows   O outputs   I inputs   r rank
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from offload.checkpoint.block import Block
from offload.checkpoint.quantized.arithmetic.pieces import fill_each, runs

ROWS = 16  # kernels sum fewer in another order
Product = tuple[torch.Tensor, torch.Tensor, float]


def with_products(
    block: Block, tensors: Mapping[str, torch.Tensor], but: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """The weights among the tensors of a block, changed where they lie unless they are among `but`."""
    small = {name for one in block.sums for b, a, _ in one.products for name in (b, a)}
    for one in block.sums:
        if one.name not in but:
            add(tensors[one.name], [(tensors[b], tensors[a], scale) for b, a, scale in one.products])
    return {name: tensor for name, tensor in tensors.items() if name not in small}


def add(weight_OI: torch.Tensor, products: Sequence[Product]) -> None:
    """Change a weight by products of B [O, r], A [r, I] and a scale."""
    # Copies: whatever lies before them in a block, they begin at the same alignment.
    wide = [(b.to(torch.float32, copy=True), a.to(torch.float32, copy=True), scale) for b, a, scale in products]

    def fill(rows: slice) -> None:
        total_RI = weight_OI[rows].float()
        for b_Or, a_rI, scale in wide:
            total_RI += (b_Or[rows] @ a_rI) * scale
        weight_OI[rows].copy_(total_RI)

    fill_each(fill, runs(weight_OI.shape[0], 4 * weight_OI.shape[1], weight_OI, ROWS), weight_OI)
