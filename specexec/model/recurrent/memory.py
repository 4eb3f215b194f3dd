"""What one recurrence keeps of one text: its state after the committed text, and vectors of the nodes below it.

A node's state is never made: it follows from the text's state and the vectors of the node's ancestors. The state of
the text is replaced at commit and never written in place, so a sweep that fails changes nothing, and a snapshot is a
reference. Where states are kept away from where they compute (travel.py), their memory is used again, and a snapshot is
a copy.   H heads   R rows   V width of values   N nodes
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Recurrence = tuple[int, str]
"""The number of a layer and the name of one of its recurrences."""

Vectors = tuple[Tensor, ...]
"""Several tensors with one entry for each node, in dimension 1."""


class NodeVectors:
    """The vectors of a text's nodes, in the order of its cache; whoever asks says how many of them are in use."""

    def __init__(self, held: Vectors = ()) -> None:
        self._held = held

    @property
    def held(self) -> Vectors:
        """All there is memory for."""
        return self._held

    @property
    def size_B(self) -> int:
        """Bytes held, unused capacity included."""
        return sum(tensor.nbytes for tensor in self._held)

    def write(self, start: int, vectors: Vectors, total: int) -> None:
        """Put vectors at `start`; when they do not fit, grow once for `total` nodes."""
        end = start + vectors[0].shape[1]
        if not self._held or end > self._held[0].shape[1]:
            self._held = _resized(self._held or vectors, start, max(end, total))
        for held, new in zip(self._held, vectors, strict=True):
            held[:, start:end] = new

    def read(self, first: int, last: int) -> Vectors:
        """The vectors of the nodes first … last - 1, as views."""
        return tuple(held[:, first:last] for held in self._held)

    def of(self, nodes: Items[int] | Tensor) -> Vectors:
        """The vectors of these nodes, copied."""
        return tuple(held[:, torch.as_tensor(nodes, dtype=torch.long, device=held.device)] for held in self._held)

    def replace(self, vectors: Vectors) -> None:
        """These are the first nodes now."""
        for held, new in zip(self._held, vectors, strict=True):
            held[:, : new.shape[1]] = new

    def cut(self, used: int, capacity: int) -> None:
        """Hold memory for `capacity` nodes at most; the first `used` stay what they are."""
        if self._held and self._held[0].shape[1] > capacity:
            self._held = _resized(self._held, used, capacity)


def _resized(vectors: Vectors, used: int, capacity: int) -> Vectors:
    resized = tuple(held.new_empty((held.shape[0], capacity, *held.shape[2:])) for held in vectors)
    for new, held in zip(resized, vectors, strict=True):
        new[:, :used] = held[:, :used]
    return resized


class Read(NamedTuple):
    """What settled rows read of a state, [H, R, V] in float32, and the state after them."""

    read_HRV: Tensor
    state: Tensor


@dataclass(frozen=True)
class Followed:
    """A state that has gone along a path, and the vectors of the nodes that hang below the path's end."""

    state: Tensor
    kept: Vectors


Follow = Callable[[Tensor, Vectors, Vectors], Followed]
"""From a state along the vectors of a path; the third argument are nodes below its end, which stay nodes."""


class Shelf:
    """Memory for what one recurrence keeps away from where it computes: by name, and used again and again."""

    def __init__(self, memory: Callable[[Tensor, tuple[int, ...]], Tensor], device: torch.device) -> None:
        self.device = device
        """Where it computes."""
        self._memory, self._flat = memory, dict[str, Tensor]()

    @property
    def size_B(self) -> int:
        """Bytes held, unused capacity included."""
        return sum(flat.nbytes for flat in self._flat.values())

    def place(self, name: str, like: Tensor) -> Tensor:
        """Memory for a tensor like this one, in place of what was there by that name."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < like.numel() or flat.dtype != like.dtype:
            flat = self._flat[name] = self._memory(like, (like.numel(),))
        return flat[: like.numel()].view(like.shape)

    def clear(self, names: str) -> None:
        """Let go of the memory of all names that begin so."""
        self._flat = {name: flat for name, flat in self._flat.items() if not name.startswith(names)}


@dataclass(eq=False)
class LayerMemory:
    """One recurrence of one layer, for one text."""

    state: Tensor
    """That after the committed text, but for `path`."""
    follow: Follow
    ahead: Tensor | None = None
    """The state after the first rows of the running sweep, where those are sure to become text."""
    marks: dict[int, Tensor] = field(default_factory=dict)
    """States on the way there, by how many of those rows they are after."""
    nodes: NodeVectors = field(default_factory=NodeVectors)
    path: Vectors = ()
    """The vectors of committed nodes that the state has yet to go along, where it computes."""
    shelf: Shelf | None = None
    """What is kept elsewhere lies there."""
    turn: int = 0
    """Of two places for states there, that of the text."""

    @property
    def text(self) -> Tensor:
        """The state after the committed text. Nothing will write into it."""
        if not self.path:
            return self.state if self.shelf is None else self.state.clone()
        state = self._moved(self.path, ()).state
        if self.shelf is None:
            self.state, self.path = state, ()
        return state

    @property
    def size_B(self) -> int:
        """Bytes held."""
        if self.shelf is not None:
            return self.shelf.size_B
        states = [self.state, *([] if self.ahead is None else [self.ahead])]
        return self.nodes.size_B + sum(state.nbytes for state in states)

    def commit(self, path: Items[int], keep: Items[int]) -> None:
        """The text goes on by the rows that are sure and by the nodes of `path`; of the others those of `keep` stay."""
        if self.ahead is not None:
            self.state, self.path, self.turn = self.ahead, (), 1 - self.turn
        self.forget()
        if path and self.shelf is not None and not keep:
            found = enumerate(self.nodes.of(path))
            self.path = tuple(self.shelf.place(f"path {number}", one).copy_(one) for number, one in found)
        elif path:
            moved = self._moved(self.nodes.of(path), self.nodes.of(keep))
            self.state = moved.state
            self.nodes.replace(moved.kept)
        elif keep and list(keep) != list(range(len(keep))):
            self.nodes.replace(self.nodes.of(keep))

    def forget(self) -> None:
        """The running sweep is over: what it was sure of is text, or is not to be."""
        self.ahead = None
        self.marks = {}

    def give_back(self, used: int, capacity: int) -> None:
        """Hold memory for the vectors of so many nodes; the first `used` stay what they are."""
        if self.shelf is None:
            self.nodes.cut(used, capacity)
        elif self.nodes.held and self.nodes.held[0].shape[1] > capacity:
            self.nodes = NodeVectors(self.nodes.of(range(used)))
            self.shelf.clear("node")

    def _moved(self, path: Vectors, kept: Vectors) -> Followed:
        """The state along a path; computed where sweeps are, so that its bits are the same wherever it is kept."""
        if self.shelf is None:
            return self.follow(self.state, path, kept)
        state, *vectors = (one.to(self.shelf.device) for one in (self.state, *path, *kept))
        moved = self.follow(state, tuple(vectors[: len(path)]), tuple(vectors[len(path) :]))
        here = self.state.device
        return Followed(moved.state.to(here), tuple(one.to(here) for one in moved.kept))


Memories = dict[Recurrence, LayerMemory]
"""Those of one text."""
