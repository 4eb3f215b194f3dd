"""The delta rule with a decay for each channel of the keys, for all nodes of a tree at once (Kimi Linear, Ling).

Per head: S_n = Diag(d_n) S_parent + k_n w_n^T and o_n = q_n^T S_n, with w_n = beta_n (v_n - k_n^T Diag(d_n) S_parent)
(Kimi Team 2025, arXiv 2510.26692, equation 1; d_n is alpha there). What a node meets of an ancestor m has faded by
F_nm, the product of d over n and the nodes between them, so that with F_n, the product over n and all its ancestors,

    o_n = (q_n F_n)^T S_0 + sum over m in A(n) and n itself of (q_n F_nm . k_m) w_m

and the same with k_n instead of q_n for what the state recalls at k_n. All rows go up to their parents in step, and
F_nm is multiplied on the way: factors never exceed 1, nothing is divided.
H heads   K width of keys   V width of values   R rows   N nodes   A rows that have an ancestor so far up
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.linear_state import corrections
from specexec.model.recurrent.memory import Followed, NodeVectors, Read, Vectors
from specexec.sizes import TRIANGLE

STEPS = 16  # settled rows that meet at a time: each goes up to all of them before it


@dataclass(frozen=True)
class ChannelRows:
    """What a layer gives for some rows, in float32; `decay_HRK` is d, between 0 and 1."""

    query_HRK: Tensor
    key_HRK: Tensor
    value_HRV: Tensor
    decay_HRK: Tensor
    beta_HR: Tensor

    name: ClassVar[str] = "channels"
    settled_at_once: ClassVar[int] = STEPS
    nodes_at_once: ClassVar[int] = TRIANGLE

    @property
    def count(self) -> int:
        return self.value_HRV.shape[1]

    def of(self, rows: slice) -> ChannelRows:
        """Some of them."""
        return ChannelRows(**{name: given[:, rows] for name, given in vars(self).items()})

    def empty(self) -> Tensor:
        """The state before the first token: zeros, [H, K, V] in float32."""
        (heads, _, values), keys = self.value_HRV.shape, self.key_HRK.shape[-1]
        return self.value_HRV.new_zeros(heads, keys, values)

    def chain(self, state_HKV: Tensor) -> Read:
        """What the rows read, [H, R, V], if each follows the one before it, and the first one the state."""
        parent_R = torch.arange(-1, self.count - 1, device=state_HKV.device)
        known = NodeVectors()
        read_HRV = self._below(known, parent_R, 0, self.count, state_HKV)
        return Read(read_HRV, follow(state_HKV, known.read(0, self.count), ()).state)

    def branch(self, known: NodeVectors, tree: Branches, nodes: slice, state_HKV: Tensor) -> Tensor:
        """What the rows read, [H, R, V], as these nodes below the state; those before them have written already."""
        return self._below(known, tree.parent_N, nodes.start, tree.count, state_HKV)

    def _below(self, known: NodeVectors, parent_N: Tensor, start: int, total: int, state_HKV: Tensor) -> Tensor:
        """Rows are the nodes from `start` on. Adds key, decay and what is written of each to what is known."""
        H, R, _ = self.key_HRK.shape
        known.write(start, (self.key_HRK, self.decay_HRK, self.value_HRV), total)
        key_HNK, decay_HNK, writes_HNV = known.read(0, start + R)
        asked_H2RK = torch.stack([self.query_HRK, self.key_HRK], 1)
        own_H2RR = asked_H2RK.new_zeros(H, 2, R, R)
        recalled_H2RV = torch.zeros_like(self.value_HRV).unsqueeze(1).repeat(1, 2, 1, 1)
        row_A = torch.arange(R, device=parent_N.device)
        node_A = row_A + start
        while len(row_A):
            here = slice(None) if len(row_A) == R else row_A
            alike_H2A = (asked_H2RK[:, :, here] * key_HNK[:, None, node_A]).sum(-1)
            mine_A = node_A >= start
            own_H2RR[:, :, row_A[mine_A], node_A[mine_A] - start] = alike_H2A[:, :, mine_A]
            if not bool(mine_A.all()):
                row_B, node_B = row_A[~mine_A], node_A[~mine_A]
                recalled_H2RV[:, :, row_B] += alike_H2A[:, :, ~mine_A, None] * writes_HNV[:, None, node_B]
            asked_H2RK[:, :, here] *= decay_HNK[:, None, node_A]
            node_A = parent_N[node_A]
            row_A, node_A = row_A[node_A >= 0], node_A[node_A >= 0]
        # Queries and keys have faded all the way up to the state by now.
        recalled_H2RV += asked_H2RK @ state_HKV.unsqueeze(1)
        written_HRV = corrections(self.value_HRV - recalled_H2RV[:, 1], own_H2RR[:, 1], self.beta_HR)
        writes_HNV[:, start:] = written_HRV
        return recalled_H2RV[:, 0] + own_H2RR[:, 0] @ written_HRV


def follow(state_HKV: Tensor, path: Vectors, kept: Vectors) -> Followed:
    """S_a = Diag(F_a) S_0 + sum over the path of (F_am k_m) w_m^T. Nodes below know nothing of where they hang."""
    key_HNK, decay_HNK, writes_HNV = path
    since_HNK = decay_HNK.flip(1).cumprod(1).flip(1)
    later_HNK = torch.cat([since_HNK[:, 1:], torch.ones_like(since_HNK[:, :1])], 1)
    written_HKV = (key_HNK * later_HNK).transpose(1, 2) @ writes_HNV
    return Followed(state_HKV.to(written_HKV) * since_HNK[:, 0].unsqueeze(-1) + written_HKV, kept)
