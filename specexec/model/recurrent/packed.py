"""The rows of all texts of a sweep at the recurrent layers: each text goes its own way, with its own memories.

R packed rows   C channels   K taps
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specexec.errors import SweepCancelled
from specexec.model.recurrent import channel_state, convolution, linear_state, selective_state
from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.channel_state import ChannelRows
from specexec.model.recurrent.linear_state import LinearRows
from specexec.model.recurrent.memory import Follow, LayerMemory, Memories, Recurrence
from specexec.model.recurrent.scan import StateRows, scan
from specexec.model.recurrent.selective_state import SelectiveRows
from specexec.model.recurrent.travel import StateTrip
from specexec.sizes import SNAPSHOT_TOKENS
from specexec.tree.tree import Ints, intervals

BEFORE_THE_END = 8  # tokens of a prompt that the next prompt may well replace: marks of an answer's beginning

INPUTS = "inputs"  # of convolutions
BLOCKS, INDEX_BLOCKS = "blocks", "index blocks"  # of tokens that become one key (compressed.py)
FOLLOW: Mapping[str, Follow] = {
    INPUTS: convolution.follow,
    BLOCKS: convolution.follow,
    INDEX_BLOCKS: convolution.follow,
    LinearRows.name: linear_state.follow,
    ChannelRows.name: channel_state.follow,
    SelectiveRows.name: selective_state.follow,
}
"""How the state of each recurrence goes along a path, by name."""


def restored(name: str, state: Tensor) -> LayerMemory:
    """The memory of a recurrence, from its state after some text."""
    return LayerMemory(state, FOLLOW[name])


@dataclass(frozen=True)
class Text:
    """One text: its packed rows start … stop - 1 are the nodes from `first_node` on."""

    start: int
    stop: int
    first_node: int
    tree: Branches
    memories: Memories


class PackedStates:
    """Takes the rows of one layer after the other, in one piece or in several, in order.

    `read_R`: which of them are read as a prompt; others belong to what is written. `trip`: of states that are kept
    elsewhere.
    """

    def __init__(
        self, texts: Items[Text], read_R: Tensor, cancelled: threading.Event, trip: StateTrip | None = None
    ) -> None:
        self._texts, self._read_R, self._cancelled, self._trip = texts, read_R, cancelled, trip
        self._done: dict[Recurrence, int] = {}

    def seen(self, layer: int) -> int:
        """Rows that a layer has been through."""
        return min((done for (number, _), done in self._done.items() if number == layer), default=0)

    def read(self, layer: int, name: str, count: int) -> Tensor:
        """Which of the next rows of a recurrence are read as a prompt, bool [count]."""
        begin = self._done.get((layer, name), 0)
        here_R = self._read_R[begin : begin + count]
        return torch.cat([here_R, here_R[-1:].expand(count - len(here_R))])

    def convolve(self, layer: int, inputs_RC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
        """A causal convolution over each text, [R, C] in the dtype of the inputs."""
        met = self._met((layer, INPUTS), inputs_RC, weight_CK.shape[1])
        return _joined([convolution.filtered(inputs, weight_CK, bias_C) for _, inputs in met], len(inputs_RC), 0)

    def met(self, layer: int, name: str, inputs_RC: Tensor, taps: int, wanted_R: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are some text's and wanted, int64 [E], and the inputs that each meets, [E, K, C]."""
        rows, found = [], []
        for first, inputs in self._met((layer, name), inputs_RC, taps):
            here_E = wanted_R[first : first + len(inputs.at_RK)].nonzero().squeeze(1)
            rows.append(here_E + first)
            found.append(inputs.of(here_E))
        return torch.cat(rows), torch.cat(found)

    def _met(self, recurrence: Recurrence, inputs_RC: Tensor, taps: int) -> Iterator[tuple[int, convolution.Met]]:
        """What the rows of each text meet of its inputs, from which of the rows on."""
        for text, here in self._pieces(recurrence, len(inputs_RC)):
            memory = here.memories.get(recurrence)
            if memory is None:
                memory = here.memories[recurrence] = convolution.empty(inputs_RC, taps)
            first, at = text.first_node + here.first, here.rows.start
            for met in convolution.met(memory, text.tree, first, inputs_RC[here.rows], taps):
                yield at, met
                at += len(met.at_RK)

    def scan(self, layer: int, rows: StateRows) -> Tensor:
        """What every row reads of its text's state, [H, R, V] in float32."""
        pieces: list[Tensor] = []
        for text, here in self._pieces((layer, rows.name), rows.count):
            own = rows.of(here.rows)
            memory = here.memories.get((layer, rows.name))
            if memory is None:
                memory = here.memories[layer, rows.name] = restored(rows.name, own.empty())
            pieces += scan(memory, text.tree, text.first_node + here.first, own)
        return _joined(pieces, rows.count, 1)

    def finish(self) -> None:
        """All layers have computed."""
        if self._trip:
            self._trip.finish()

    def _pieces(self, recurrence: Recurrence, count: int) -> Iterator[tuple[Text, _Piece]]:
        """What every text has among the next rows; rows beyond the last one fill a tile."""
        if self._cancelled.is_set():
            raise SweepCancelled
        begin = self._done.get(recurrence, 0)
        end = self._done[recurrence] = begin + count
        away = self._trip.here(recurrence[0]) if self._trip and self._trip.carries(recurrence[0]) else None
        for number, text in enumerate(self._texts):
            first, last = max(begin, text.start), min(end, text.stop)
            if first < last:
                memories = text.memories if away is None else away[number]
                yield text, _Piece(first - text.start, slice(first - begin, last - begin), memories)


@dataclass(frozen=True)
class _Piece:
    """Rows of one text within those that are asked about; `first` counts the text's own. `memories` are where they
    compute.
    """

    first: int
    rows: slice
    memories: Memories


def _joined(pieces: list[Tensor], count: int, dim: int) -> Tensor:
    """All rows, `count` of them: the last own row again for each that fills a tile."""
    missing = count - sum(piece.shape[dim] for piece in pieces)
    last = pieces[-1].narrow(dim, -1, 1)
    return torch.cat([*pieces, *[last] * missing], dim)


def branches_of(parents_N: Ints, settled: int, marks: tuple[int, ...], device: torch.device) -> Branches:
    """The rows of a cache: `settled` ones below the committed text, and the nodes at their end."""
    chain = np.arange(-1, settled - 1)
    below_N = parents_N[settled:]
    assert (parents_N[:settled] == chain).all(), "settled rows are a chain"
    assert (below_N >= settled - 1).all(), "nodes hang at the settled end"
    own_N = below_N - settled
    own_N[own_N < 0] = -1
    times = intervals(own_N)
    parent_N, enter_N, leave_N = (
        torch.from_numpy(np.asarray(ints, np.int64)).to(device) for ints in (own_N, times.enter_N, times.leave_N)
    )
    return Branches(settled, parent_N, enter_N, leave_N, marks)


def marks(committed: int, settled: int, forks: Iterable[int]) -> tuple[int, ...]:
    """After how many settled rows a state is worth keeping: often enough, and where another text may part from this."""
    regular = range(0, committed + settled, SNAPSHOT_TOKENS)
    before = [settled - BEFORE_THE_END] if settled >= 2 * BEFORE_THE_END else []
    wanted = (at - committed for at in (*regular, *forks) if committed < at < committed + settled)
    return tuple(sorted({*before, *wanted}))
