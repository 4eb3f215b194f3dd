"""Short causal convolutions, one filter per channel: a row meets its nearest ancestors, then the end of the text.

C channels   K taps of the filter   R rows   N nodes
"""

from __future__ import annotations

import torch
from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.memory import Followed, LayerMemory, Vectors


def empty(inputs_RC: Tensor, taps: int) -> LayerMemory:
    """What a convolution keeps of a text: its last taps - 1 inputs, [K - 1, C]; zeros before the first token."""
    return LayerMemory(inputs_RC.new_zeros(taps - 1, inputs_RC.shape[1]), follow)


def convolve(
    memory: LayerMemory, tree: Branches, start: int, inputs_RC: Tensor, weight_CK: Tensor, bias_C: Tensor | None
) -> Tensor:
    """y_r = sum_k w_k x_{r - (K - 1 - k)} + b, [R, C] in the dtype of the inputs, sums in float32.

    inputs_RC: those of the text's rows from `start` on, settled ones before nodes. x_{r - i} is the i-th ancestor's.
    Remembers the inputs of the nodes, and the last inputs of the settled rows.
    """
    taps = weight_CK.shape[1]
    sure = max(min(tree.settled - start, len(inputs_RC)), 0)
    outputs = []
    if sure:
        before = memory.ahead if start else memory.text
        assert before is not None
        known_SC = torch.cat([before.to(inputs_RC), inputs_RC[:sure]])
        at_RK = torch.arange(sure, device=inputs_RC.device)[:, None] + torch.arange(taps, device=inputs_RC.device)
        outputs.append(_filtered(known_SC, at_RK, weight_CK, bias_C))
        for mark in tree.marks:
            if start < mark <= start + sure:
                memory.marks[mark] = known_SC[mark - start : mark - start + taps - 1].cpu()
        memory.ahead = known_SC[sure:].clone()
    if sure < len(inputs_RC):
        first = start + sure - tree.settled
        rows = slice(first, first + len(inputs_RC) - sure)
        memory.nodes.write(first, (inputs_RC[sure:].unsqueeze(0),), tree.count)
        before = memory.text if memory.ahead is None else memory.ahead
        known_SC = torch.cat([before.to(inputs_RC), memory.nodes.read(0, rows.stop)[0][0]])
        outputs.append(_filtered(known_SC, tree.inputs(rows, taps), weight_CK, bias_C))
    return torch.cat(outputs)


def _filtered(known_SC: Tensor, at_RK: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    mixed_RC = torch.zeros(len(at_RK), known_SC.shape[1], device=known_SC.device)
    for at_R, weight_C in zip(at_RK.T, weight_CK.float().T, strict=True):
        mixed_RC.addcmul_(known_SC[at_R].float(), weight_C)
    if bias_C is not None:
        mixed_RC += bias_C.float()
    return mixed_RC.to(known_SC.dtype)


def follow(last_TC: Tensor, path: Vectors, kept: Vectors) -> Followed:
    inputs_NC = path[0][0]
    return Followed(torch.cat([last_TC.to(inputs_NC), inputs_NC])[len(inputs_NC) :], kept)
