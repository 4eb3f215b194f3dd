"""States that decay and take outer products: the gated delta rule and Mamba-2, for all nodes of a tree at once.

Per head: S_n = e^{g_n} S_parent + k_n w_n^T and o_n = q_n^T S_n. With G_n, the sum of g over a node and its ancestors
A(n), and S_0, the state after the text, that is

    o_n = e^{G_n} q_n^T S_0 + sum over m in A(n) and n itself of e^{G_n - G_m} (q_n . k_m) w_m

so k, w and G of each node suffice. What a node writes, w, is given (Mamba-2, Dao and Gu 2024, section 6), or follows
from what the state recalls at k (gated delta rule; Yang, Kautz and Hatamizadeh 2024, section 3.3):

    w_n = beta_n (v_n - e^{G_n} k_n^T S_0 - sum over m in A(n) of e^{G_n - G_m} (k_n . k_m) w_m)

which for rows together is a triangular system, since parents come first. Exponents are never positive.
H heads   J heads of keys, H / J heads share one   K width of keys   V width of values   R rows   M earlier nodes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.memory import Followed, NodeVectors, Read, Vectors
from specexec.sizes import TRIANGLE

BLOCK = 64  # settled rows that meet at a time
FORGOTTEN = -64.0  # e to its power is 1e-28; products with less fall below normal floats, where CPUs take ages


@dataclass(frozen=True)
class LinearRows:
    """What a layer gives for some rows, in float32. Without `beta_HR` the values are written as they are."""

    name: ClassVar[str] = "state"
    settled_at_once: ClassVar[int] = BLOCK
    nodes_at_once: ClassVar[int] = TRIANGLE

    query_JRK: Tensor
    key_JRK: Tensor
    value_HRV: Tensor
    decay_HR: Tensor
    """g, the logarithm of the decay: never positive."""
    beta_HR: Tensor | None = None

    @property
    def count(self) -> int:
        return self.value_HRV.shape[1]

    def of(self, rows: slice) -> LinearRows:
        """Some of them."""
        return LinearRows(
            self.query_JRK[:, rows],
            self.key_JRK[:, rows],
            self.value_HRV[:, rows],
            self.decay_HR[:, rows],
            None if self.beta_HR is None else self.beta_HR[:, rows],
        )

    def empty(self) -> Tensor:
        """The state before the first token: zeros, [H, K, V] in float32."""
        (heads, _, values), keys = self.value_HRV.shape, self.key_JRK.shape[-1]
        return self.value_HRV.new_zeros(heads, keys, values)

    def chain(self, state_HKV: Tensor) -> Read:
        """What the rows read, [H, R, V], if each follows the one before it, and the first one the state."""
        sum_HR = self.decay_HR.double().cumsum(1)
        chain_RR = torch.ones(self.count, self.count, dtype=torch.bool, device=sum_HR.device).tril()
        found_HRV, writes_HRV = _Block(self, sum_HR, state_HKV).solved(chain_RR)
        return Read(found_HRV, follow(state_HKV, (self.key_JRK, writes_HRV, sum_HR), ()).state)

    def branch(self, known: NodeVectors, tree: Branches, nodes: slice, state_HKV: Tensor) -> Tensor:
        """What the rows read, [H, R, V], as these nodes below the state; those before them have written already."""
        own_RR, earlier_R = tree.above(nodes, nodes.start, nodes.stop), tree.above_all(nodes)
        sum_HR = self.decay_HR.double() @ own_RR.T.double()
        if nodes.start:
            sums_HM = known.read(0, nodes.start)[2]
            sum_HR = sum_HR + torch.where(earlier_R < 0, 0.0, sums_HM[:, earlier_R.clamp(min=0)])
        block = _Block(self, sum_HR, state_HKV)
        above_RN = tree.above(nodes, 0, nodes.start)
        earlier_M = above_RN.any(0).nonzero().squeeze(1)  # few of a tree's nodes have children so far on
        for first in range(0, len(earlier_M), TRIANGLE):
            node_M = earlier_M[first : first + TRIANGLE]
            block.recall(above_RN[:, node_M], *known.of(node_M))
        found_HRV, writes_HRV = block.solved(own_RR)
        known.write(nodes.start, (self.key_JRK, writes_HRV, sum_HR), tree.count)
        return found_HRV


class _Block:
    """Rows that are solved together, and what they have recalled so far at their queries and at their keys."""

    def __init__(self, rows: LinearRows, sum_HR: Tensor, base_HKV: Tensor) -> None:
        self._rows, self._sum_HR = rows, sum_HR
        asked = [rows.query_JRK] if rows.beta_HR is None else [rows.query_JRK, rows.key_JRK]
        self._asked_JQK = torch.cat(asked, 1)  # Q: the rows once, or twice
        self._times = len(asked)
        J, (H, K, V) = len(self._asked_JQK), base_HKV.shape
        state = base_HKV.reshape(J, H // J, K, V)
        recalled_HQV = (self._asked_JQK.unsqueeze(1) @ state).flatten(0, 1)
        self._recalled_HQV = recalled_HQV.mul_(_left(sum_HR).repeat(1, self._times).unsqueeze(-1))

    def recall(self, above_RM: Tensor, key_JMK: Tensor, writes_HMV: Tensor, sum_HM: Tensor) -> None:
        """What earlier nodes wrote, where they are ancestors."""
        self._recalled_HQV.baddbmm_(self._weights(above_RM, key_JMK, sum_HM), writes_HMV)

    def solved(self, own_RR: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows read and what they write, [H, R, V] each, once all that came before is recalled.

        own_RR: bool, which rows are above which, each above itself.
        """
        rows, R = self._rows, self._rows.count
        weights_HQR = self._weights(own_RR, rows.key_JRK, self._sum_HR)
        writes_HRV = rows.value_HRV
        if rows.beta_HR is not None:
            writes_HRV = corrections(rows.value_HRV - self._recalled_HQV[:, R:], weights_HQR[:, R:], rows.beta_HR)
        return torch.baddbmm(self._recalled_HQV[:, :R], weights_HQR[:, :R], writes_HRV), writes_HRV

    def _weights(self, above_RM: Tensor, key_JMK: Tensor, sum_HM: Tensor) -> Tensor:
        """e^{G_r - G_m} (q_r . k_m) where m is above r, else 0; [H, Q, M]."""
        (J, M, _), H, R = key_JMK.shape, len(sum_HM), len(above_RM)
        row_P, node_P = above_RM.nonzero(as_tuple=True)  # few of a tree's pairs are a row and what is above it
        fade_HF = key_JMK.new_zeros(H, R * M)
        fade_HF.index_copy_(1, row_P * M + node_P, _left(self._sum_HR[:, row_P] - sum_HM[:, node_P]))
        alike_JQM = self._asked_JQK @ key_JMK.transpose(1, 2)
        shape = (J, H // J, self._times, R, M)
        weights = alike_JQM.view(J, 1, self._times, R, M) * fade_HF.view(J, H // J, 1, R, M).expand(shape)
        return weights.view(H, self._times * R, M)


def _left(total: Tensor) -> Tensor:
    """e^total in float32, and 0 for what nothing else could tell from it."""
    return total.float().masked_fill_(total < FORGOTTEN, -torch.inf).exp_()


def corrections(missing_HRV: Tensor, weights_HRR: Tensor, beta_HR: Tensor) -> Tensor:
    """The delta rule: w_r = beta_r (missing_r - sum over m < r of weights_rm w_m), [H, R, V]."""
    beta_HR1 = beta_HR.unsqueeze(-1)
    # Only what is below the diagonal is read: a row does not recall itself.
    return torch.linalg.solve_triangular(
        weights_HRR * beta_HR1, missing_HRV * beta_HR1, upper=False, unitriangular=True
    )


def follow(state_HKV: Tensor, path: Vectors, kept: Vectors) -> Followed:
    """S_a = e^{G_a} S_0 + sum over the path of e^{G_a - G_m} k_m w_m^T; sums of nodes below count from there."""
    key_JNK, writes_HNV, sum_HN = path
    end_H1, shared = sum_HN[:, -1:], len(writes_HNV) // len(key_JNK)
    faded_HNV = writes_HNV * _left(end_H1 - sum_HN).unsqueeze(-1)
    state = state_HKV.to(faded_HNV) * _left(end_H1).unsqueeze(-1)
    state.baddbmm_(key_JNK.transpose(1, 2).repeat_interleave(shared, 0), faded_HNV)
    return Followed(state, (kept[0], kept[1], kept[2] - end_H1) if kept else ())
