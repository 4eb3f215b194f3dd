"""What the layers keep of one sequence: of its committed text first, then of the nodes of the running sweep.

Rows count only once committed; whatever happens in a sweep, forgetting its nodes restores the committed state. States
of recurrent layers cannot go back: a rewind takes the last snapshot, and what follows it is read again.
H key heads   R rows   D head size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specexec.model.recurrent.memory import LayerMemory, Recurrence
from specexec.model.taps import Tapped
from specexec.sizes import GROWTH_ROWS, SINKS, SNAPSHOT_TOKENS, SNAPSHOTS, rows_held

Room = Callable[[Tensor, tuple[int, ...]], Tensor]


def beside(rows_HRD: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory of the dtype of other rows, where those are."""
    return rows_HRD.new_empty(shape)


@dataclass
class LayerKV:
    """Rows of one layer, [H, capacity, D] each; only the first rows are in use. They grow in `memory`."""

    keys_HRD: Tensor
    values_HRD: Tensor
    memory: Room = beside

    @staticmethod
    def empty(key_HRD: Tensor, value_HRD: Tensor) -> LayerKV:
        """No rows yet, shaped like the ones given."""
        return LayerKV(key_HRD[:, :0], value_HRD[:, :0])

    def write(self, start: int, key_HRD: Tensor, value_HRD: Tensor, total: int) -> None:
        """Put rows at `start`; when they do not fit, grow once for the `total` rows that this sweep will write."""
        end = start + key_HRD.shape[1]
        if self.keys_HRD.device != key_HRD.device:
            self.keys_HRD, self.values_HRD = self.keys_HRD.to(key_HRD.device), self.values_HRD.to(value_HRD.device)
        if end > self.keys_HRD.shape[1]:
            capacity = rows_held(max(end, total))
            self.keys_HRD = self._resized(self.keys_HRD, start, capacity)
            self.values_HRD = self._resized(self.values_HRD, start, capacity)
        self.keys_HRD[:, start:end] = key_HRD
        self.values_HRD[:, start:end] = value_HRD

    def head(self, count: int) -> LayerKV:
        """A copy of the first `count` rows, with room to grow."""
        return self._copied(self.memory, count, rows_held(count))

    def kept_in(self, memory: Room, used: int, total: int, spare: int = 0) -> LayerKV:
        """These rows in `memory` with room for `total`: itself if it is so already, else a copy of those in use, with
        room for `spare` more.
        """
        if self.memory == memory and self.keys_HRD.shape[1] >= total:
            return self
        return self._copied(memory, used, rows_held(total + spare))

    def runs(self, other: LayerKV, start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What to copy from where to bring over the rows `start` … `end` - 1 of another, each pair one run of bytes."""
        for ours, theirs in ((self.keys_HRD, other.keys_HRD), (self.values_HRD, other.values_HRD)):
            if start < end:
                yield from zip(ours[:, start:end], theirs[:, start:end], strict=True)

    def cut(self, used: int, capacity: int) -> None:
        """Hold memory for `capacity` rows only; the first `used` stay what they are."""
        self.keys_HRD = self._resized(self.keys_HRD, used, capacity)
        self.values_HRD = self._resized(self.values_HRD, used, capacity)

    def move(self, rows_R: Tensor, start: int) -> None:
        """Copy the given rows, in order, to `start` and on."""
        end = start + len(rows_R)
        self.keys_HRD[:, start:end] = self.keys_HRD.index_select(1, rows_R)
        self.values_HRD[:, start:end] = self.values_HRD.index_select(1, rows_R)

    def _copied(self, memory: Room, used: int, capacity: int) -> LayerKV:
        copy = LayerKV(self.keys_HRD, self.values_HRD, memory)
        copy.keys_HRD = copy._resized(self.keys_HRD, used, capacity)
        copy.values_HRD = copy._resized(self.values_HRD, used, capacity)
        return copy

    def _resized(self, rows_HRD: Tensor, used: int, capacity: int) -> Tensor:
        heads, _, size = rows_HRD.shape
        grown_HRD = self.memory(rows_HRD, (heads, capacity, size))
        grown_HRD[:, :used] = rows_HRD[:, :used]
        return grown_HRD


@dataclass(frozen=True)
class Snapshot:
    """The states of all recurrences after the first `length` tokens, in RAM. Nothing writes into them."""

    length: int
    states: dict[Recurrence, Tensor]


@dataclass(eq=False)
class KVCache:
    """The tree cache of one sequence.

    `tokens` are the committed ones: row i of every layer belongs to token i at position i. The first `unread` of them
    have no rows where a model could not read them (drafters/head.py); the rows of the others are counted from 0.
    With a `window` rows of text behind the first SINKS are dropped as it grows, so that at least so many last ones stay
    (StreamingLLM, Xiao et al. 2024; MagicDec, Chen et al. 2024); `dropped` are gone, the others keep their positions.
    Of the first `thinned` tokens some rows were left out, chosen for this text: no other text begins with the rest.
    `parents` are those of the nodes after them (-1 = follows the committed text), in row order.
    `settled`: so many nodes are a chain that can only be committed whole. Recurrent layers keep `memories` of text and
    other nodes, and `snapshots` of earlier states, in order of length. Of a model that is tapped (taps.py), `tapped`
    are the hidden states of the nodes, [N, H] by tap, and `taken` those of the text.

    The first `prompt` tokens are read as a prompt (None: all are), which makes a difference to a model that is
    `stepwise` (architecture.limits_steps).
    """

    layers: dict[int, LayerKV] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    node_tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    settled: int = 0
    memories: dict[Recurrence, LayerMemory] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    forks: set[int] = field(default_factory=set)
    """Lengths at which another text is known to part from this one: worth a snapshot."""
    unread: int = 0
    window: int | None = None
    dropped: int = 0
    thinned: int = 0
    tapped: dict[int, Tensor] = field(default_factory=dict)
    taken: Tapped | None = None
    prompt: int | None = None
    stepwise: bool = False
    queries: dict[int, list[Tensor]] | None = None
    """Where it is not None: what each layer asked for the nodes, scaled, [H, Q, D] for some rows at a time."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """Committed tokens that have rows: all of them, but for the first `unread` and those that were dropped."""
        return len(self.tokens) - self.unread - self.dropped

    @property
    def position(self) -> int:
        """That of the next token, counted from the first that was read."""
        return len(self.tokens) - self.unread

    @property
    def size_B(self) -> int:
        """Bytes held, unused capacity included."""
        rows_B = sum(kv.keys_HRD.nbytes + kv.values_HRD.nbytes for kv in self.layers.values())
        taken_B = sum(rows.nbytes for rows in self.taken.states.values()) if self.taken else 0
        return rows_B + sum(memory.size_B for memory in self.memories.values()) + taken_B

    def write(self, layer: int, node: int, key_HRD: Tensor, value_HRD: Tensor) -> LayerKV:
        """Store the rows of the nodes from `node` on in one layer."""
        if layer not in self.layers:
            self.layers[layer] = LayerKV.empty(key_HRD, value_HRD)
        self.layers[layer].write(self.rows + node, key_HRD, value_HRD, self.rows + len(self.parents))
        return self.layers[layer]

    def commit(self, path: Items[int], keep: Items[int] = ()) -> None:
        """Make the nodes of `path` (root to leaf, each the child of the one before) part of the text.

        The nodes of `keep` (ascending) stay nodes, numbered from 0 in their order; all others are forgotten.
        """
        expected = -1
        for node in path:
            assert self.parents[node] == expected, "a committed path must be connected"
            expected = node
        rows = [*path, *keep]
        if rows != list(range(len(rows))):
            for kv in self.layers.values():
                rows_R = torch.tensor(rows, dtype=torch.long, device=kv.keys_HRD.device) + self.rows
                kv.move(rows_R, start=self.rows)
        if self.memories:
            self._commit_states(list(path), list(keep))
        self._take(list(path))
        self.settled = 0
        self.tokens += [self.node_tokens[node] for node in path]
        new_index = {node: i for i, node in enumerate(keep)}
        self.node_tokens = [self.node_tokens[node] for node in keep]
        self.parents = [new_index.get(self.parents[node], -1) for node in keep]
        self._slide()

    def thin(self, rows: Items[int], tokens: int) -> None:
        """Of the rows of the first `tokens`, which are all there, only these stay (ascending), at their positions."""
        stay = [*rows, *range(tokens, self.rows + len(self.parents))]
        for kv in self.layers.values():
            kv.move(torch.tensor(stay, dtype=torch.long, device=kv.keys_HRD.device), start=0)
        self.dropped, self.thinned = tokens - len(rows), tokens

    def _slide(self) -> None:
        """Drop what lies before the window, many rows at a time: every time all others move."""
        excess = 0 if self.window is None else self.rows - SINKS - self.window
        if excess < GROWTH_ROWS:
            return
        stay = range(SINKS + excess, self.rows + len(self.parents))
        for kv in self.layers.values():
            kv.move(torch.tensor(stay, dtype=torch.long, device=kv.keys_HRD.device), start=SINKS)
        self.dropped += excess

    def _take(self, path: list[int]) -> None:
        """Keep the hidden states of a path that becomes text; those of other nodes are of no use any more."""
        if self.tapped and path:
            states = {tap: rows_NH[path] for tap, rows_NH in self.tapped.items()}
            new = Tapped(len(self) + len(path), states).latest()
            self.taken = self.taken.followed_by(new) if self.taken else new
        self.tapped = {}

    def path(self, tokens: Items[int]) -> list[int]:
        """The nodes that spell the beginning of `tokens` below the committed text, as far as there are any."""
        tokens_N, parents_N = np.array(self.node_tokens), np.array(self.parents)
        path: list[int] = []
        for token in tokens:
            found = np.flatnonzero((parents_N == (path[-1] if path else -1)) & (tokens_N == token))
            if not len(found):
                break
            path.append(int(found[0]))
        return path

    def _commit_states(self, path: list[int], keep: list[int]) -> None:
        """States go along the path; those worth a way back are kept on the way."""
        settled, length = self.settled, len(self)
        assert path[:settled] == list(range(settled)), "settled rows are committed whole"
        marks = sorted(set.intersection(*(set(memory.marks) for memory in self.memories.values())))
        if marks and length:
            self._remember(length, {key: memory.text for key, memory in self.memories.items()})
        for mark in marks:
            self._remember(length + mark, {key: memory.marks[mark] for key, memory in self.memories.items()})
        for memory in self.memories.values():
            memory.commit([node - settled for node in path[settled:]], [node - settled for node in keep])
        if length + len(path) >= (self.snapshots[-1].length if self.snapshots else 0) + SNAPSHOT_TOKENS:
            self._remember(length + len(path), {key: memory.text for key, memory in self.memories.items()})

    def _remember(self, length: int, states: dict[Recurrence, Tensor]) -> None:
        if not self.snapshots or self.snapshots[-1].length < length:
            self.snapshots.append(Snapshot(length, {key: state.cpu() for key, state in states.items()}))
            del self.snapshots[:-SNAPSHOTS]

    def prefix(self, length: int) -> KVCache:
        """A copy of the beginning, as that of another text: `length` tokens, or as far as there is a snapshot."""
        length = self.reusable(length)
        states = self._states(length)
        unread = min(self.unread, length)
        dropped = self._dropped(length)
        rows = {index: kv.head(length - unread - dropped) for index, kv in self.layers.items()}
        copy = KVCache(rows, self.tokens[:length], unread=unread, window=self.window, dropped=dropped)
        if states is not None:
            copy._restore(self.memories, states)
            copy.snapshots = [snapshot for snapshot in self.snapshots if snapshot.length <= length]
        copy.taken = self.taken.until(length) if self.taken else None
        copy.prompt, copy.stepwise = self.prompt, self.stepwise
        return copy

    def reusable(self, length: int) -> int:
        """How many tokens `prefix` would give of so many, and `rewind` would leave of a text that is another then."""
        return 0 if self.thinned else self._left(length)

    def _left(self, length: int) -> int:
        """How many tokens `rewind` would leave of so many."""
        length = self._with_rows(min(length, len(self)))
        states = None if length == len(self) else self._states(length)
        if states is None:
            return length
        return states.length if self._with_rows(states.length) == states.length else 0

    def _with_rows(self, length: int) -> int:
        """So many tokens, or fewer where that would end among dropped ones."""
        if self.thinned:
            return length if length >= self.thinned else 0
        first = self.unread + SINKS
        return first if first < length < first + self.dropped else length

    def _dropped(self, length: int) -> int:
        """Of the first `length` tokens."""
        return self.dropped if length >= (self.thinned or self.unread + SINKS + self.dropped) else 0

    def _states(self, length: int) -> Snapshot | None:
        """The last states at or before `length` tokens; None where no layer is recurrent."""
        if not self.memories:
            return None
        if length == len(self):
            return Snapshot(length, {key: memory.text for key, memory in self.memories.items()})
        before = [snapshot for snapshot in self.snapshots if snapshot.length <= length]
        return before[-1] if before else Snapshot(0, {})

    def _restore(self, memories: Mapping[Recurrence, LayerMemory], states: Snapshot) -> None:
        self.memories = {key: LayerMemory(state, memories[key].follow) for key, state in states.states.items()}

    def give_back(self, tokens: int = 0, nodes: int = 0) -> None:
        """Let go of memory beyond what so many tokens and nodes need, and those in use."""
        used = self.rows + len(self.parents)
        capacity = rows_held(max(tokens - self.dropped + nodes, used))
        for kv in self.layers.values():
            if kv.keys_HRD.shape[1] > capacity:
                kv.cut(used, capacity)
        own = len(self.parents) - self.settled
        for memory in self.memories.values():
            memory.give_back(own, max(nodes, own))

    def forget_nodes(self, after: int = 0) -> None:
        """Drop the nodes from index `after` on; all of them by default."""
        del self.node_tokens[after:], self.parents[after:]
        self.tapped = {}
        if after < self.settled:
            self.settled = 0
            for memory in self.memories.values():
                memory.forget()

    def begin(self, tokens: Items[int], prompt: int | None) -> None:
        """Belong to the text of `tokens` from now on: what both texts share stays, if it was read in the same way."""
        shared = common_prefix(self.tokens, tokens)
        if self.stepwise and prompt != self.prompt:
            shared = min(shared, *(length for length in (prompt, self.prompt) if length is not None))
        if self.thinned and prompt != self.prompt:
            shared = 0
        if shared < len(self):
            self.rewind(shared)
        self.prompt = prompt

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; with recurrent layers, all that follows a snapshot.

        Where that ends among dropped tokens, all that follow them too.
        """
        self.forget_nodes()
        if length < len(self):
            length = self._left(length)
            if (states := self._states(length)) is not None:
                self._restore(self.memories, states)
                self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.length <= length]
            self.dropped = self._dropped(length)
            self.thinned = self.thinned if self.dropped else 0
        if self.taken:
            self.taken = self.taken.until(length)
        del self.tokens[length:]
        self.unread = min(self.unread, length)


def common_prefix(left: Items[int], right: Items[int]) -> int:
    """How many leading tokens two texts share."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:  # nearly always, several times a sweep, and at the speed of C
        return length
    return next((i for i in range(length) if left[i] != right[i]), length)
