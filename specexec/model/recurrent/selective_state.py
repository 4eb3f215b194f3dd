"""Selective state spaces (Mamba, Gu and Dao 2023, algorithm 2), for the nodes of a tree one depth after the other.

Each channel has S numbers that decay at rates of their own: s_n = e^{t_n A} s_parent + t_n x_n B_n and y_n = C_n . s_n.
The decay differs between all those numbers, so no product of matrices has it; t_n, t_n x_n and B_n of the nodes
suffice for the states along any path, of some channels at a time.
C channels   S numbers of a channel   R rows   N nodes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches, Level
from specexec.model.recurrent.memory import Followed, NodeVectors, Read, Vectors
from specexec.sizes import MOST_NODES, SELECTIVE_STATES

STEPS = 64  # settled rows whose states exist at a time


@dataclass(frozen=True)
class SelectiveRows:
    """What a layer gives for some rows, in float32: t, t x, B and C; `rate_CS` is A, never positive."""

    step_RC: Tensor
    written_RC: Tensor
    key_RS: Tensor
    query_RS: Tensor
    rate_CS: Tensor

    name: ClassVar[str] = "selective"
    settled_at_once: ClassVar[int] = STEPS
    nodes_at_once: ClassVar[int] = MOST_NODES

    @property
    def count(self) -> int:
        return len(self.step_RC)

    def of(self, rows: slice) -> SelectiveRows:
        """Some of them."""
        return SelectiveRows(
            self.step_RC[rows], self.written_RC[rows], self.key_RS[rows], self.query_RS[rows], self.rate_CS
        )

    def empty(self) -> Tensor:
        """The state before the first token, and the rates at which it decays, [2, C, S] in float32."""
        return torch.stack([torch.zeros_like(self.rate_CS), self.rate_CS])

    def chain(self, state_2CS: Tensor) -> Read:
        """What the rows read, [1, R, C], if each follows the one before it, and the first one the state."""
        vectors = (self.step_RC, self.written_RC, self.key_RS)
        read_RC, after_2CS = torch.empty_like(self.step_RC), state_2CS.clone()
        for channels, states_RCS in _states(state_2CS, vectors, _chain(self.count)):
            read_RC[:, channels] = _read(states_RCS[1:], self.query_RS)
            after_2CS[0, channels] = states_RCS[-1]
        return Read(read_RC.unsqueeze(0), after_2CS)

    def branch(self, known: NodeVectors, tree: Branches, nodes: slice, state_2CS: Tensor) -> Tensor:
        """What the rows read, [1, R, C], as these nodes below the state; those above them are followed once more."""
        vectors = (self.step_RC, self.written_RC, self.key_RS)
        known.write(nodes.start, tuple(rows.unsqueeze(0) for rows in vectors), tree.count)
        lineage = tree.lineage(nodes)
        of_all = tuple(held[0][lineage.node_N] for held in known.read(0, nodes.stop))
        read_RC = torch.empty_like(self.step_RC)
        for channels, states_NCS in _states(state_2CS, of_all, lineage.levels):
            read_RC[:, channels] = _read(states_NCS[lineage.place_R], self.query_RS)
        return read_RC.unsqueeze(0)


def follow(state_2CS: Tensor, path: Vectors, kept: Vectors) -> Followed:
    """The state of the path's end. Nodes below know nothing of where they hang."""
    vectors = tuple(held[0] for held in path)
    after_2CS = state_2CS.to(vectors[0].device, copy=True)
    for channels, states_NCS in _states(state_2CS.to(vectors[0]), vectors, _chain(len(vectors[0]))):
        after_2CS[0, channels] = states_NCS[-1]
    return Followed(after_2CS, kept)


def _chain(count: int) -> list[Level]:
    return [Level(slice(row, row + 1), slice(row, row + 1)) for row in range(count)]


def _states(state_2CS: Tensor, vectors: Vectors, levels: Sequence[Level]) -> Iterator[tuple[slice, Tensor]]:
    """The states before and after nodes, [1 + N, C, S], of some channels after the other. Levels are parents first."""
    step_NC, written_NC, key_NS = vectors
    (N, S), C = key_NS.shape, step_NC.shape[1]
    width = max(SELECTIVE_STATES // (N * S), 1)
    for first in range(0, C, width):
        channels = slice(first, min(first + width, C))
        before_CS, rate_CS = state_2CS[:, channels]
        states_NCS = before_CS.new_empty(N + 1, *before_CS.shape)
        states_NCS[0] = before_CS
        torch.mul(written_NC[:, channels, None], key_NS[:, None], out=states_NCS[1:])
        fade_NCS = (step_NC[:, channels, None] * rate_CS).exp_()
        for level in levels:
            states_NCS[level.rows.start + 1 : level.rows.stop + 1].addcmul_(
                fade_NCS[level.rows], states_NCS[level.above]
            )
        yield channels, states_NCS


def _read(states_RCS: Tensor, query_RS: Tensor) -> Tensor:
    return (states_RCS @ query_RS.unsqueeze(-1)).squeeze(-1)
