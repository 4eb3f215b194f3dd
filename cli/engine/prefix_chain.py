"""What the prefix cache holds of one model's texts: a folder of files, found by the token ids that they are of.

A block holds the rows of BLOCK tokens, and its name is a hash of all tokens up to its end: texts that begin alike share
blocks. What a text has beyond its last block lies in an end. Only there a model with recurrent layers can go on: an end
holds the states of that place, too. Any file may be gone at any time: another process makes room, or it was damaged.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cli.engine.prefix_piece import DamagedPiece, PrefixPiece, read_piece, write_piece
from offload.machine.atomic_write import PRIVATE, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from specexec.model.cache import KVCache, Room
    from specexec.model.recurrent.memory import Recurrence

    MemoryOf = Callable[[int], Room]  # of each layer

log = logging.getLogger(__name__)

BLOCK = 256
SUFFIX = ".safetensors"
ABOUT = "about.json"
Kind = Literal["rows", "states", "all"]
"""Of ends: rows behind the last block, the same and states, or all rows of a text that has dropped some."""


@dataclass(frozen=True)
class End:
    """Where a text can be gone on with: `count` tokens behind so many blocks. Without a name it is a block's end."""

    blocks: int
    count: int = 0
    kind: Kind = "rows"
    name: str = ""

    @property
    def length(self) -> int:
        return self.blocks * BLOCK + self.count


class Unreadable(Exception):
    """A file is not there, or not what it was; `gone`: it will not be looked for again."""

    def __init__(self, gone: bool) -> None:
        super().__init__()
        self.gone = gone


class PrefixChain:
    """The texts of one model; the folder's name is the model's identity."""

    def __init__(self, folder: Path, said: Mapping[str, str] | None = None) -> None:
        """`said`: what is written into a new folder about the model, for people."""
        self.folder, self._said = folder, said or {}

    def known(self, tokens: Items[int]) -> int:
        """How many of these tokens can be had."""
        return max((end.length for end in self._ends(tokens)), default=0)

    def load(self, tokens: Items[int], memory: MemoryOf) -> KVCache | None:
        """A cache of the beginning of these tokens, as far as there is one; rows lie in the `memory` of their layer."""
        while ends := sorted(self._ends(tokens), key=lambda end: end.length):
            try:
                return self._read(tokens, ends, memory)
            except Unreadable as problem:
                if not problem.gone:
                    break
        return None

    def keep(self, cache: KVCache, has_room: Callable[[int], bool]) -> None:
        """Write what is not there yet of a cache, as long as the disk `has_room` for so many bytes. Raises OSError."""
        length = min(len(cache), cache.prompt or 0) if cache.stepwise else len(cache)
        if cache.unread or cache.thinned or not (cache.layers or cache.memories):
            return
        tokens, kind = cache.tokens[:length], _kind(cache)
        keys, names = self._keys(tokens), list[str]()
        if kind != "all":
            names += keys[1:]
            blocks = (_rows(cache, at * BLOCK, (at + 1) * BLOCK) for at in range(len(keys) - 1))
            if not all(self._put(*of, cache, has_room) for of in zip(keys[1:], blocks, strict=True)):
                return
        for at, states in _places(cache, length).items():
            if kind != "rows" or at % BLOCK:
                first = 0 if kind == "all" else at // BLOCK * BLOCK
                names.append(self._end_name(keys, tokens[:at], kind))
                if not self._put(names[-1], _rows(cache, first, at - cache.dropped) | states, cache, has_room):
                    return
        if kind == "rows":  # ends within what is kept now are of no more use
            self._remove(end.name for end in self._listed(keys, tokens, self._names()) if end.length < length)
        self._touch(names)

    def forget(self, tokens: Items[int]) -> None:
        """Remove all that is kept of a text, what others share with it too."""
        keys = self._keys(tokens)
        self._remove([*keys[1:], *(end.name for end in self._listed(keys, tokens, self._names()))])

    def _read(self, tokens: Items[int], ends: list[End], memory: MemoryOf) -> KVCache:
        """The longest of these; recurrent layers get the states of the others as well."""
        from specexec.model.cache import KVCache, Snapshot
        from specexec.model.recurrent.packed import restored

        last = ends[-1]
        blocks = [] if last.kind == "all" else self._keys(tokens)[1 : last.blocks + 1]
        names = [*blocks, *([last.name] if last.name else [])]
        cache, row = KVCache(tokens=list(tokens[: last.length])), 0
        for name in names:
            piece = self._opened(name)
            if piece.recurrent and last.kind == "rows":
                raise Unreadable(gone=False)  # the states of this place are not there any more
            cache.dropped, cache.stepwise = piece.dropped, piece.stepwise
            row = _written(cache, piece, row, memory)
        cache.prompt = last.length if cache.stepwise else None
        if last.kind == "states":
            cache.memories = {key: restored(key[1], state) for key, state in _states(piece).items()}
            cache.snapshots = [Snapshot(end.length, _states(self._opened(end.name))) for end in ends[:-1]]
        self._touch(names)
        return cache

    def _opened(self, name: str) -> PrefixPiece:
        try:
            return read_piece(self._path(name), name)
        except FileNotFoundError:
            raise Unreadable(gone=True) from None
        except DamagedPiece:
            log.warning("%s is damaged and is removed: its part of the text is read again.", self._path(name))
            try:
                self._remove([name])
            except OSError:
                raise Unreadable(gone=False) from None
            raise Unreadable(gone=True) from None

    def _ends(self, tokens: Items[int]) -> Iterator[End]:
        """Where these tokens can be gone on with, as far as the names of files say."""
        keys, there = self._keys(tokens), self._names()
        blocks = next((at for at in range(1, len(keys)) if keys[at] not in there), len(keys)) - 1
        listed = [end for end in self._listed(keys, tokens, there) if end.kind == "all" or end.blocks <= blocks]
        yield from (end for end in listed if end.kind != "rows" or end.blocks == blocks)
        if blocks and not any(end.kind == "states" for end in listed):
            yield End(blocks)

    def _listed(self, keys: list[str], tokens: Items[int], there: set[str]) -> Iterator[End]:
        """The ends that lie on the way of these tokens."""
        blocks = {key: at for at, key in enumerate(keys)}
        for name in there:
            before, *rest = name.split("-")
            if rest and before in blocks:
                end = End(blocks[before], int(rest[1]), rest[0], name)  # type: ignore[arg-type]  # we wrote it
                if end.length <= len(tokens) and name == self._end_name(keys, tokens[: end.length], end.kind):
                    yield end

    def _put(self, name: str, tensors: dict[str, Tensor], cache: KVCache, has_room: Callable[[int], bool]) -> bool:
        """Whether a file of this name is there now."""
        if self._path(name).exists():
            return True
        piece = PrefixPiece(name, bool(cache.memories), cache.stepwise, cache.dropped, tensors)
        if not has_room(piece.size_B):
            return False
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.folder / ABOUT).exists():
            with replacing(self.folder / ABOUT, PRIVATE) as file:
                file.write(json.dumps(self._said).encode())
        write_piece(self._path(name), piece)
        return True

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def _touch(self, names: list[str]) -> None:
        """They were used now, the first of them last: a text that makes room loses its end first."""
        now_ns = time.time_ns()
        for place, name in enumerate(names):
            try:
                os.utime(self._path(name), ns=(now_ns - place, now_ns - place))
            except FileNotFoundError:  # another process has made room
                continue

    def _names(self) -> set[str]:
        if not self.folder.is_dir():
            return set()
        return {file.removesuffix(SUFFIX) for file in os.listdir(self.folder) if file.endswith(SUFFIX)}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _keys(self, tokens: Items[int]) -> list[str]:
        """The name of the place before the first token, and of each block."""
        ids, keys = np.array(tokens, np.int64), [_hashed(self.folder.name, b"")]
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            keys.append(_hashed(keys[-1], ids[start : start + BLOCK].tobytes()))
        return keys

    def _end_name(self, keys: list[str], tokens: Items[int], kind: Kind) -> str:
        blocks, count = divmod(len(tokens), BLOCK)
        rest = np.array(tokens[blocks * BLOCK :], np.int64).tobytes()
        return f"{keys[blocks]}-{kind}-{count}-{_hashed(keys[blocks], rest)}"


def _hashed(before: str, tokens: bytes) -> str:
    return blake2b(before.encode() + tokens, digest_size=16).hexdigest()


def _kind(cache: KVCache) -> Kind:
    if cache.dropped:
        return "all"
    return "states" if cache.memories else "rows"


def _places(cache: KVCache, length: int) -> dict[int, dict[str, Tensor]]:
    """Where a cache can be gone on with, up to `length`, and the states of that place."""
    states = {one.length: one.states for one in cache.snapshots if one.length <= length and not cache.dropped}
    if length == len(cache):
        states[length] = {key: memory.text for key, memory in cache.memories.items()}
    elif not cache.memories:
        states[length] = {}
    named = {at: {f"state.{layer}.{name}": one for (layer, name), one in some.items()} for at, some in states.items()}
    return {at: some for at, some in named.items() if at}


def _rows(cache: KVCache, first: int, last: int) -> dict[str, Tensor]:
    found = {}
    for layer, kv in cache.layers.items():
        found[f"rows.{layer}.keys"] = kv.keys_HRD[:, first:last]
        found[f"rows.{layer}.values"] = kv.values_HRD[:, first:last]
    return found


def _written(cache: KVCache, piece: PrefixPiece, row: int, memory: MemoryOf) -> int:
    """The next row, after those of a piece are in a cache from `row` on."""
    from specexec.model.cache import LayerKV
    from specexec.sizes import rows_held

    end, capacity = row, rows_held(cache.rows)
    for name, keys_HRD in piece.tensors.items():
        kind, layer, part = name.split(".", 2)
        if (kind, part) != ("rows", "keys"):
            continue
        values_HRD, number = piece.tensors[f"rows.{layer}.values"], int(layer)
        if number not in cache.layers:
            cache.layers[number] = LayerKV(keys_HRD[:, :0], values_HRD[:, :0], memory(number))
        cache.layers[number].write(row, keys_HRD, values_HRD, capacity)
        end = row + keys_HRD.shape[1]
    return end


def _states(piece: PrefixPiece) -> dict[Recurrence, Tensor]:
    found = {}
    for name, state in piece.tensors.items():
        kind, layer, recurrence = name.split(".", 2)
        if kind == "state":
            found[int(layer), recurrence] = state
    return found
