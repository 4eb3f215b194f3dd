"""Who hangs below whom among the rows of one text in one sweep, as recurrent layers ask. Knows no layer.

The first `settled` rows are a chain that is sure to become text; the nodes after them are counted from 0 here.
N nodes   R rows, a slice of the nodes   T inputs before a node
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64  # rows of a chain, or nodes that came before, that meet at a time


@dataclass(frozen=True)
class Branches:
    """Parents and depth-first intervals of the nodes, int64 [N], in an order with parents first.

    `marks`: after so many settled rows a state is worth keeping.
    """

    settled: int
    parent_N: Tensor
    enter_N: Tensor
    leave_N: Tensor
    marks: tuple[int, ...] = ()
    _inputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.parent_N)

    def above(self, rows: slice, first: int, last: int) -> Tensor:
        """Bool [R, last - first]: is the node first + column an ancestor of the row, or the row itself?"""
        enter_R1 = self.enter_N[rows].unsqueeze(1)
        return (enter_R1 >= self.enter_N[first:last]) & (enter_R1 < self.leave_N[first:last])

    def above_all(self, rows: slice) -> Tensor:
        """Int64 [R]: the nearest ancestor of each row that comes before all of them; -1 where there is none."""
        topmost_R = self.above(rows, rows.start, rows.stop).int().argmax(1) + rows.start
        return self.parent_N[topmost_R]

    def inputs(self, rows: slice, taps: int) -> Tensor:
        """Int64 [R, taps]: which inputs a convolution over `taps` inputs meets at each row, its own last.

        They count the last taps - 1 inputs of the text first, then the nodes.
        """
        if taps not in self._inputs:
            text = taps - 1
            before_T = torch.arange(-1, text - 1, device=self.parent_N.device).clamp(min=0)
            before = torch.cat([before_T, torch.where(self.parent_N < 0, max(text - 1, 0), self.parent_N + text)])
            columns = [torch.arange(self.count, device=before.device) + text]
            for _ in range(text):
                columns.insert(0, before[columns[0]])
            self._inputs[taps] = torch.stack(columns, 1)
        return self._inputs[taps][rows]

    def steps(self, first: int, last: int) -> list[slice]:
        """The settled rows first … last - 1 in pieces of at most BLOCK rows that end where a state is worth keeping."""
        ends = sorted({*range(first + BLOCK, last, BLOCK), *(mark for mark in self.marks if first < mark < last), last})
        return [slice(start, end) for start, end in zip([first, *ends], ends, strict=False)]
