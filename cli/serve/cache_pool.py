"""Keys and values of other texts, for a text with the same beginning. Owned by the engine's thread."""

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

    def take(self, prompt: list[int], *, live: Items[Caches]) -> Taken:
        """Of the idle and the live sets the one that shares most with `prompt`: itself where it is idle and the rest of
        it is not worth more than what is shared, else a copy of the beginning.
        """
        from specexec.engine.batch import WORTH_COPYING

        taken = Taken({}, 0)
        found = [Taken(some, _shared(some, prompt)) for some in (*self._idle, *live)]
        best = max(found, key=lambda one: one.shared, default=taken)
        is_idle = any(some is best.by_model for some in self._idle)
        if is_idle and 2 * best.shared > len(_longest(best.by_model)):
            self._idle = [some for some in self._idle if some is not best.by_model]
            taken = best
        elif best.shared >= WORTH_COPYING:
            taken = Taken({model: cache.prefix(best.shared) for model, cache in best.by_model.items()}, best.shared)
        self._make_room(len(live) + 1)
        return taken

    def shared(self, prompt: list[int], live: Items[Caches]) -> int:
        """How many tokens of a prompt need not be computed."""
        return max((_shared(some, prompt) for some in (*self._idle, *live)), default=0)

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


def _shared(caches: Caches, prompt: list[int]) -> int:
    """How many tokens of the prompt these hold for every model that has read so much."""
    from specexec.model.cache import common_prefix

    return max((cache.reusable(common_prefix(cache.tokens, prompt[:-1])) for cache in caches.values()), default=0)


def _longest(caches: Caches) -> Items[int]:
    return max((cache.tokens for cache in caches.values()), key=len)
