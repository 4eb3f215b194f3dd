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

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.memory import Followed, LayerMemory, Vectors
from specexec.sizes import TRIANGLE


@dataclass(frozen=True)
class LinearRows:
    """What a layer gives for some rows, in float32. Without `beta_HR` the values are written as they are."""

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


def empty(rows: LinearRows) -> LayerMemory:
    """The state before the first token: zeros, [H, K, V] in float32."""
    (heads, _, values), keys = rows.value_HRV.shape, rows.key_JRK.shape[-1]
    return LayerMemory(rows.value_HRV.new_zeros(heads, keys, values), follow)


def scan(memory: LayerMemory, tree: Branches, start: int, rows: LinearRows) -> Tensor:
    """What every row reads, [H, R, V] in float32. Remembers what nodes write, and the state after settled rows.

    rows: those of the text's rows from `start` on, settled ones before nodes.
    """
    sure = max(min(tree.settled - start, rows.count), 0)
    outputs = []
    if sure:
        state_HKV = memory.ahead if start else memory.text
        assert state_HKV is not None
        state_HKV = state_HKV.to(rows.value_HRV)
        for step in tree.steps(start, start + sure):
            here = rows.of(slice(step.start - start, step.stop - start))
            sum_HR = here.decay_HR.double().cumsum(1)
            chain_RR = torch.ones(here.count, here.count, dtype=torch.bool, device=sum_HR.device).tril()
            block = _Block(here, sum_HR, state_HKV)
            found_HRV, writes_HRV = block.solved(chain_RR)
            outputs.append(found_HRV)
            state_HKV = follow(state_HKV, (here.key_JRK, writes_HRV, sum_HR), ()).state
            if step.stop in tree.marks:
                memory.marks[step.stop] = state_HKV.cpu()
        memory.ahead = state_HKV
    base_HKV = (memory.text if memory.ahead is None else memory.ahead).to(rows.value_HRV)
    for first in range(sure, rows.count, TRIANGLE):
        here = rows.of(slice(first, min(first + TRIANGLE, rows.count)))
        node = start + first - tree.settled
        outputs.append(_branching(memory, tree, slice(node, node + here.count), here, base_HKV))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _branching(memory: LayerMemory, tree: Branches, nodes: slice, rows: LinearRows, base_HKV: Tensor) -> Tensor:
    """The same for some nodes; those before them have written already."""
    own_RR, earlier_R = tree.above(nodes, nodes.start, nodes.stop), tree.above_all(nodes)
    sum_HR = rows.decay_HR.double() @ own_RR.T.double()
    if nodes.start:
        sums_HM = memory.nodes.read(0, nodes.start)[2]
        sum_HR = sum_HR + torch.where(earlier_R < 0, 0.0, sums_HM[:, earlier_R.clamp(min=0)])
    block = _Block(rows, sum_HR, base_HKV)
    for first in range(0, nodes.start, TRIANGLE):
        last = min(first + TRIANGLE, nodes.start)
        above_RM = tree.above(nodes, first, last)
        if above_RM.any():
            block.recall(above_RM, *memory.nodes.read(first, last))
    found_HRV, writes_HRV = block.solved(own_RR)
    memory.nodes.write(nodes.start, (rows.key_JRK, writes_HRV, sum_HR), tree.count)
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
        self._recalled_HQV = recalled_HQV * sum_HR.exp().float().repeat(1, self._times).unsqueeze(-1)

    def recall(self, above_RM: Tensor, key_JMK: Tensor, writes_HMV: Tensor, sum_HM: Tensor) -> None:
        """What earlier nodes wrote, where they are ancestors."""
        self._recalled_HQV += self._weights(above_RM, key_JMK, sum_HM) @ writes_HMV

    def solved(self, own_RR: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows read and what they write, [H, R, V] each, once all that came before is recalled.

        own_RR: bool, which rows are above which, each above itself.
        """
        rows, R = self._rows, self._rows.count
        weights_HQR = self._weights(own_RR, rows.key_JRK, self._sum_HR)
        writes_HRV = rows.value_HRV
        if rows.beta_HR is not None:
            beta_HR1 = rows.beta_HR.unsqueeze(-1)
            corrected = (rows.value_HRV - self._recalled_HQV[:, R:]) * beta_HR1
            # Only what is below the diagonal is read: a row does not recall itself.
            writes_HRV = torch.linalg.solve_triangular(
                weights_HQR[:, R:] * beta_HR1, corrected, upper=False, unitriangular=True
            )
        return self._recalled_HQV[:, :R] + weights_HQR[:, :R] @ writes_HRV, writes_HRV

    def _weights(self, above_RM: Tensor, key_JMK: Tensor, sum_HM: Tensor) -> Tensor:
        """e^{G_r - G_m} (q_r . k_m) where m is above r, else 0; [H, Q, M]."""
        fade_HRM = (self._sum_HR.unsqueeze(-1) - sum_HM.unsqueeze(1)).masked_fill_(~above_RM, -torch.inf).float().exp_()
        alike_JQM = self._asked_JQK @ key_JMK.transpose(1, 2)
        J, H = len(key_JMK), len(sum_HM)
        shape = (J, H // J, self._times, *fade_HRM.shape[1:])
        return (
            (
                alike_JQM.unflatten(1, (self._times, -1)).unsqueeze(1)
                * fade_HRM.unflatten(0, (J, H // J)).unsqueeze(2).expand(shape)
            )
            .flatten(2, 3)
            .flatten(0, 1)
        )


def follow(state_HKV: Tensor, path: Vectors, kept: Vectors) -> Followed:
    """S_a = e^{G_a} S_0 + sum over the path of e^{G_a - G_m} k_m w_m^T; sums of nodes below count from there."""
    key_JNK, writes_HNV, sum_HN = path
    H, K, V = state_HKV.shape
    J, end_H1 = len(key_JNK), sum_HN[:, -1:]
    faded_HNV = writes_HNV * (end_H1 - sum_HN).exp().float().unsqueeze(-1)
    written = key_JNK.transpose(1, 2).unsqueeze(1) @ faded_HNV.unflatten(0, (J, H // J))
    state = state_HKV.to(written) * end_H1.exp().float().unsqueeze(-1) + written.reshape(H, K, V)
    return Followed(state, (kept[0], kept[1], kept[2] - end_H1) if kept else ())
