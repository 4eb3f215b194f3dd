"""The rows of one text through a recurrence: those that are sure, one after the other, and then the nodes below them.

Knows nothing of what a recurrence computes: that is what the rows themselves say.
H heads   R rows   V width of values
"""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from specexec.model.recurrent.branches import Branches
from specexec.model.recurrent.memory import LayerMemory, NodeVectors, Read


class StateRows(Protocol):
    """What a layer gives for some rows, as the recurrence of their kind takes it. Rows are those of one text."""

    @property
    def name(self) -> str:
        """That of the recurrence."""

    @property
    def settled_at_once(self) -> int:
        """Settled rows that `chain` is asked about at a time, at most."""

    @property
    def nodes_at_once(self) -> int:
        """Nodes that `branch` is asked about at a time, at most."""

    @property
    def count(self) -> int:
        """R."""

    def of(self, rows: slice) -> Self:
        """Some of them."""

    def empty(self) -> Tensor:
        """The state before the first token."""

    def chain(self, state: Tensor) -> Read:
        """What the rows read if each follows the one before it, and the first one the state."""

    def branch(self, known: NodeVectors, tree: Branches, nodes: slice, state: Tensor) -> Tensor:
        """What the rows read, [H, R, V], as these nodes of a tree below the state.

        `known` has the vectors of the nodes before them, and gets theirs.
        """


def scan(memory: LayerMemory, tree: Branches, start: int, rows: StateRows) -> list[Tensor]:
    """What the rows read, [H, R, V] in float32, in pieces. Keeps vectors of nodes, and the state after settled rows.

    rows: those of the text's rows from `start` on, settled ones before nodes.
    """
    sure = max(min(tree.settled - start, rows.count), 0)
    outputs = []
    if sure:
        state = memory.ahead if start else memory.text
        assert state is not None
        for step in tree.steps(start, start + sure, rows.settled_at_once):
            found = rows.of(slice(step.start - start, step.stop - start)).chain(state.to(tree.parent_N.device))
            state = found.state
            outputs.append(found.read_HRV)
            if step.stop in tree.marks:
                memory.marks[step.stop] = state.cpu()
        memory.ahead = state
    base = (memory.text if memory.ahead is None else memory.ahead).to(tree.parent_N.device)
    for first in range(sure, rows.count, rows.nodes_at_once):
        here = rows.of(slice(first, min(first + rows.nodes_at_once, rows.count)))
        node = start + first - tree.settled
        outputs.append(here.branch(memory.nodes, tree, slice(node, node + here.count), base))
    return outputs
