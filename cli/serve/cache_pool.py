"""Keys and values of finished texts, kept for the next text with the same beginning. Owned by the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from specexec.model.cache import KVCache

    Caches = dict[object, KVCache]


class Taken(NamedTuple):
    """What a new text may start from: caches by model, and how many of its tokens they hold already."""

    by_model: Caches
    shared: int


class IdleCaches:
    """At most `room` sets of caches, live ones included; the least recently used goes first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._idle: list[Caches] = []

    def take(self, prompt: list[int], *, live: int) -> Taken:
        """The set that shares most with `prompt`, if the rest of it is not worth more than what is shared."""
        from specexec.model.cache import common_prefix

        best: Taken | None = None
        for caches in self._idle:
            longest = _longest(caches)
            shared = common_prefix(longest, prompt[:-1])
            if 2 * shared > len(longest) and shared > (best.shared if best else 0):
                best = Taken(caches, shared)
        if best:
            self._idle = [caches for caches in self._idle if caches is not best.by_model]
        self._make_room(live + 1)
        return best or Taken({}, 0)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each set, oldest first."""
        return [len(_longest(caches)) for caches in self._idle]

    def drop_oldest(self) -> None:
        """Free the memory of the set that was used longest ago."""
        del self._idle[:1]

    def put(self, caches: Caches) -> None:
        """Keep what a text has computed, for another that goes on from it."""
        if caches:
            for cache in caches.values():
                cache.forget_nodes()
                cache.give_back()
            self._idle.append(caches)
            self._make_room(0)

    def _make_room(self, live: int) -> None:
        del self._idle[: max(0, len(self._idle) + live - self._room)]


def _longest(caches: Caches) -> Items[int]:
    return max((cache.tokens for cache in caches.values()), key=len)
