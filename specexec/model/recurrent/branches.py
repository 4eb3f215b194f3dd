"""Who hangs below whom among the rows of one text in one sweep, as recurrent layers ask. Knows no layer.

The first `settled` rows are a chain that is sure to become text; the nodes after them are counted from 0 here.
N nodes   R rows, a slice of the nodes   T inputs before a node
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """Rows that do not hang below one another, and what is above each: states, 0 the text's, n + 1 that of row n."""

    rows: slice
    above: slice | Tensor


@dataclass(frozen=True)
class Lineage:
    """Some nodes and all that are above them, by depth.

    `node_N`: which nodes, int64. `levels`: those of one depth, and their parents. `place_R`: the state of each of the
    nodes themselves, as `Level` counts.
    """

    node_N: Tensor
    levels: list[Level]
    place_R: Tensor


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
    _lineages: dict[tuple[int, int], Lineage] = field(default_factory=dict)

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

    def lineage(self, rows: slice) -> Lineage:
        """The same rows in all layers: kept."""
        key = rows.start, rows.stop
        if key not in self._lineages:
            self._lineages[key] = self._lineage(rows)
        return self._lineages[key]

    def _lineage(self, rows: slice) -> Lineage:
        member_N = self.above(rows, 0, rows.stop).any(0).nonzero().squeeze(1)
        depth_N, above_N = torch.zeros_like(member_N), self.parent_N[member_N]
        while bool((above_N >= 0).any()):
            depth_N += above_N >= 0
            above_N = torch.where(above_N < 0, -1, self.parent_N[above_N])
        order_N = depth_N.argsort(stable=True)
        node_N = member_N[order_N]
        place_N = torch.zeros(rows.stop + 1, dtype=torch.long, device=node_N.device)  # at -1 that of the text
        place_N[node_N] = torch.arange(1, len(node_N) + 1, device=node_N.device)
        levels, start = [], 0
        for count in depth_N.bincount().tolist():
            here = slice(start, start + count)
            levels.append(Level(here, place_N[self.parent_N[node_N[here]]]))
            start += count
        return Lineage(node_N, levels, place_N[rows])

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

    def steps(self, first: int, last: int, most: int) -> list[slice]:
        """The settled rows first … last - 1 in pieces of at most `most` that end where a state is worth keeping."""
        ends = sorted({*range(first + most, last, most), *(mark for mark in self.marks if first < mark < last), last})
        return [slice(start, end) for start, end in zip([first, *ends], ends, strict=False)]
