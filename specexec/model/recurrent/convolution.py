"""Short causal convolutions, one filter per channel: a row meets its nearest ancestors, then the end of the text.

C channels   K taps of the filter   R rows   N nodes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.memory import Followed, LayerMemory, Vectors

CHANNELS = 512


def empty(inputs_RC: Tensor, taps: int) -> LayerMemory:
    """What a convolution keeps of a text: its last taps - 1 inputs, [K - 1, C]; zeros before the first token."""
    return LayerMemory(inputs_RC.new_zeros(taps - 1, inputs_RC.shape[1]), follow)


@dataclass(frozen=True)
class Met:
    """The inputs that rows meet, int64 [R, K], their own last: they count through `known`, one tensor after another."""

    known: list[Tensor]
    at_RK: Tensor

    def of(self, rows_E: Tensor) -> Tensor:
        """Those of some of the rows, [E, K, C]."""
        return torch.cat(self.known)[self.at_RK[rows_E]]


def met(memory: LayerMemory, tree: Branches, start: int, inputs_RC: Tensor, taps: int) -> list[Met]:
    """What the text's rows from `start` on meet, whose inputs these are: settled rows, then nodes.

    Remembers the inputs of the nodes, and the last inputs of the settled rows.
    """
    sure = max(min(tree.settled - start, len(inputs_RC)), 0)
    found = []
    if sure:
        before = memory.ahead if start else memory.text
        assert before is not None
        known_SC = torch.cat([before.to(inputs_RC), inputs_RC[:sure]])
        at_RK = torch.arange(sure, device=inputs_RC.device)[:, None] + torch.arange(taps, device=inputs_RC.device)
        found.append(Met([known_SC], at_RK))
        for mark in tree.marks:
            if start < mark <= start + sure:
                memory.marks[mark] = known_SC[mark - start : mark - start + taps - 1].cpu()
        memory.ahead = known_SC[sure:].clone()
    if sure < len(inputs_RC):
        first = start + sure - tree.settled
        rows = slice(first, first + len(inputs_RC) - sure)
        memory.nodes.write(first, (inputs_RC[sure:].unsqueeze(0),), tree.count)
        before = memory.text if memory.ahead is None else memory.ahead
        known = [before.to(inputs_RC), memory.nodes.read(0, rows.stop)[0][0]]
        found.append(Met(known, tree.inputs(rows, taps)))
    return found


def filtered(inputs: Met, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """y_r = sum_k w_k x_{r - (K - 1 - k)} + b, [R, C] in the dtype of the inputs; sums in float32.

    x_{r - i} is the i-th ancestor's. Some channels at a time, which a CPU caches.
    """
    known, at_RK = inputs.known, inputs.at_RK
    weight_KC = weight_CK.T.float().contiguous()
    filtered_RC = known[0].new_empty(len(at_RK), len(weight_CK))
    for first in range(0, len(weight_CK), CHANNELS):
        channels = slice(first, first + CHANNELS)
        known_SC = torch.cat([inputs[:, channels] for inputs in known]).float()
        mixed_RC = known_SC.index_select(0, at_RK[:, 0]).mul_(weight_KC[0, channels])
        for at_R, weight_C in zip(at_RK.T[1:], weight_KC[1:, channels], strict=True):
            mixed_RC.addcmul_(known_SC.index_select(0, at_R), weight_C)
        filtered_RC[:, channels] = mixed_RC if bias_C is None else mixed_RC.add_(bias_C[channels].float())
    return filtered_RC


def follow(last_TC: Tensor, path: Vectors, kept: Vectors) -> Followed:
    inputs_NC = path[0][0]
    return Followed(torch.cat([last_TC.to(inputs_NC), inputs_NC])[len(inputs_NC) :], kept)
