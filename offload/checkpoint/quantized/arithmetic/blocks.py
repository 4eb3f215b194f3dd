"""Codes times the scales of their blocks: (code - zero) * scale in float32, rounded once. Knows no format.

One path for every format whose scales lie in a grid over the weight.   O rows   I columns   G blocks of a row
"""

from collections.abc import Callable, Iterator

import torch

from offload.checkpoint.quantized.arithmetic.pieces import SLICE_B, fill_each

# Of a GPU's memory this much holds float32 values on their way.
GPU_SLICE_B = 32 << 20
Values = Callable[[slice], torch.Tensor]


def fill_blocks(
    target_OI: torch.Tensor,
    values: Values,
    scales: torch.Tensor,
    block: tuple[int, int],
    zeros: torch.Tensor | None = None,
    rows_of: torch.Tensor | None = None,
    columns_of: torch.Tensor | None = None,
) -> None:
    """Fill `target_OI` from `values(rows)`, new float32 tensors [rows, I]; scales and zeros have a number a block.

    `rows_of` [O] and `columns_of` [I] say which row and column of the grid a value belongs to, where these are not in
    order; -1 counts from the end.
    """
    O, I = target_OI.shape
    height, width = block

    def own(grid: torch.Tensor, rows: slice) -> torch.Tensor:
        if rows_of is not None:
            chosen = rows_of[rows].long() % len(grid)
        else:
            chosen = torch.arange(rows.start, rows.stop, device=grid.device) // height
        numbers = grid.index_select(0, chosen).float()
        return numbers if columns_of is None else numbers.index_select(1, columns_of.long() % grid.shape[1])

    def fill(rows: slice) -> None:
        wide = values(rows)
        for grid, change in ((zeros, torch.Tensor.sub_), (scales, torch.Tensor.mul_)):
            if grid is not None:
                _for_each_block(wide, own(grid, rows), 1 if columns_of is not None else width, change)
        target_OI[rows].copy_(wide)

    fill_each(fill, _runs(O, I, not target_OI.is_cpu), target_OI)


def _for_each_block(
    values: torch.Tensor,
    numbers: torch.Tensor,
    width: int,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Change values [R, I] in place by the number of each block of `width` columns; the last one may be narrower."""
    full = values.shape[1] // width
    if full:
        change(values[:, : full * width].unflatten(1, (full, width)), numbers[:, :full, None])
    if full * width < values.shape[1]:
        change(values[:, full * width :], numbers[:, full:])


def _runs(rows: int, columns: int, on_gpu: bool) -> Iterator[slice]:
    step = max(1, (GPU_SLICE_B if on_gpu else SLICE_B) // (columns * 4))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_table(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What a table has for each code of a uint8 tensor: much faster than torch's own conversions on a CPU."""
    return table.index_select(0, codes.reshape(-1).int()).view(*codes.shape, *table.shape[1:])
