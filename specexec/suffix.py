"""Texts remembered by their endings: which tokens followed this context, for every match length. Knows tokens only.

Two stores answer the same question. `Recent` learns token by token and forgets the least recently written n-grams;
`Settled` is a sorted array over a text that no longer changes (REST, He et al. 2023): 8 bytes a token kept, 16 in use.
E entries   L longest match
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

RUNGS = (1, 2, 3, 5, 8, 13)  # match lengths told apart; a match of 7 tokens counts as one of 5
LONGEST = RUNGS[-1]
GAP = 2**32 - 1  # stands between two texts; no token has this id
WORD = 4  # bytes of a token in a settled text
SAMPLE = 32  # occurrences looked at where a context has more
REMEMBERED = 1 << 14  # contexts whose followers are not counted again


class Match(NamedTuple):
    """What followed the last RUNGS[rung] tokens of a context: (token, times seen), most often and latest first."""

    rung: int
    followers: list[tuple[int, int]]


@dataclass(frozen=True)
class Context:
    """The end of a text, at most LONGEST tokens, oldest first."""

    tokens: tuple[int, ...]

    @staticmethod
    def of(tokens: Items[int]) -> Context:
        """The end of any text."""
        return Context(tuple(tokens[-LONGEST:]))

    def then(self, token: int) -> Context:
        """The context one token later."""
        return Context((*self.tokens[1 - LONGEST :], token))

    @cached_property
    def keys(self) -> list[int]:
        """One number for each rung that the text is long enough for."""
        return [hash(self.tokens[-length:]) for length in RUNGS if length <= len(self.tokens)]

    @cached_property
    def backwards(self) -> bytes:
        """Latest token first, in bytes that compare as the tokens do."""
        return np.array(self.tokens[::-1], ">u4").tobytes()


class Store(Protocol):
    """Anything that remembers what followed."""

    def matches(self, context: Context) -> Iterator[Match]:
        """Every rung at which the context was seen, longest first."""
        ...


class Recent:
    """Learns online; never holds more than `limit` n-grams (the least recently written go first)."""

    def __init__(self, limit: int = 1 << 18, followers: int = 8) -> None:
        self._limit = limit
        self._followers = followers
        # Most n-grams are met once: those are a bare token, only the others need counts.
        self._after: dict[int, int | dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._after)

    def add(self, context: Context, token: int, rungs: int = len(RUNGS)) -> None:
        """Remember that `token` followed, at the first `rungs` match lengths."""
        after = self._after
        for key in context.keys[:rungs]:
            known = after.pop(key, None)  # and back in at the end: the order of the dict is the order of writing
            if known is None:
                after[key] = token
                continue
            counts = {known: 1} if isinstance(known, int) else known
            counts[token] = counts.pop(token, 0) + 1
            if len(counts) > self._followers:
                del counts[min(counts, key=counts.__getitem__)]
            after[key] = counts
        while len(after) > self._limit:
            del after[next(iter(after))]

    def extend(self, text: Items[int], start: int = 1) -> None:
        """Remember every token of `text` from index `start` on, each with what stands before it."""
        start = max(start, 1)
        context = Context.of(text[max(0, start - LONGEST) : start])
        for token in text[start:]:
            self.add(context, token)
            context = context.then(token)

    def matches(self, context: Context) -> Iterator[Match]:
        """Every rung at which the context was seen, longest first."""
        for rung in range(len(context.keys) - 1, -1, -1):
            known = self._after.get(context.keys[rung])
            if isinstance(known, int):
                yield Match(rung, [(known, 1)])
            elif known is not None:
                yield Match(rung, _ranked(known))


class Settled:
    """A text, GAPs between its parts, and its positions in the order of what stands before them, read backwards."""

    def __init__(self, tokens_E: NDArray[np.uint32], order_E: NDArray[np.uint32]) -> None:
        self.tokens_E = tokens_E
        self.order_E = order_E
        self._tokens = np.ascontiguousarray(tokens_E).data
        self._order = np.ascontiguousarray(order_E).data
        self._backwards = tokens_E[::-1].astype(">u4").tobytes()
        self._end = len(tokens_E) * WORD
        # The last two tokens before each position as one number, sorted as they stand: most of a search is over there.
        at_E = order_E.astype(np.int64)
        before_E = np.where(at_E > 1, np.minimum(tokens_E[at_E - 2], GAP - 1) + 1, 0)  # 0: nothing stands there
        self._pairs = ((tokens_E[at_E - 1].astype(np.uint64) << np.uint64(32)) | before_E.astype(np.uint64)).data
        self._known: dict[tuple[int, int], list[tuple[int, int]]] = {}

    @staticmethod
    def of(texts: Iterable[Items[int]]) -> Settled:
        """Sort the positions of all texts by their contexts."""
        parts = [np.array([*text, GAP], np.uint32) for text in texts]
        return Settled.joined(np.concatenate(parts) if parts else np.zeros(0, np.uint32))

    @staticmethod
    def joined(tokens_E: NDArray[np.uint32]) -> Settled:
        """The same for texts that stand in one array, GAPs between them."""
        return Settled(tokens_E, sorted_positions(tokens_E))

    def __len__(self) -> int:
        return len(self.tokens_E)

    def matches(self, context: Context) -> Iterator[Match]:
        """Every rung at which the context was seen, longest first; common ones are counted on a sample."""
        if not context.tokens or not self._order:
            return
        low = context.tokens[-1] << 32
        block = self._between(low, low + (1 << 32), 0, len(self._order))
        if block[0] == block[1]:
            return
        if len(context.tokens) > 1:
            pair = self._between(low + context.tokens[-2] + 1, low + context.tokens[-2] + 2, *block)
            if pair[0] < pair[1]:
                for rung in range(self._longest(context.backwards, pair), 1, -1):
                    yield Match(rung, self._followers(*self._range(context.backwards[: RUNGS[rung] * WORD], pair)))
                yield Match(1, self._followers(*pair))
        yield Match(0, self._followers(*block))

    def _between(self, low: int, high: int, first: int, last: int) -> tuple[int, int]:
        """Where the pairs from `low` on and below `high` stand."""
        first = bisect_left(self._pairs, low, first, last)
        return first, bisect_left(self._pairs, high, first, last)

    def _followers(self, first: int, last: int) -> list[tuple[int, int]]:
        """What stands after the contexts in one range of the order, counted once while it is asked about often."""
        found = self._known.get((first, last))
        if found is None:
            step = max(1, (last - first) // SAMPLE)
            found = _ranked(Counter([self._tokens[position] for position in self._order[first:last:step]]))
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[first, last] = found
        return found

    def _before(self, position: int, size: int) -> bytes:
        """The tokens before a position, latest first, `size` bytes of them."""
        start = self._end - position * WORD
        return self._backwards[start : start + size]

    def _range(self, ending: bytes, block: tuple[int, int]) -> tuple[int, int]:
        def key(position: int) -> bytes:
            return self._before(position, len(ending))

        first = bisect_left(self._order, ending, *block, key=key)
        return first, bisect_right(self._order, ending, first, block[1], key=key)

    def _longest(self, ending: bytes, pair: tuple[int, int]) -> int:
        """The rung of the longest ending that occurs: that of one of the two neighbours in the sorted order."""
        at = bisect_left(self._order, ending, *pair, key=lambda position: self._before(position, len(ending)))
        near = [self._before(self._order[i], len(ending)) for i in (at - 1, at) if pair[0] <= i < pair[1]]
        for rung in range(len(RUNGS) - 1, 1, -1):
            size = RUNGS[rung] * WORD
            if size <= len(ending) and any(one[:size] == ending[:size] for one in near):
                return rung
        return 1


def sorted_positions(tokens_E: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Positions that hold a token, by the tokens before them: latest first, LONGEST deep (prefix doubling)."""
    count = len(tokens_E)
    if count < 2:
        return np.zeros(0, np.uint32)
    # rank_E[i] orders the contexts that end with token i by their last `depth` tokens; 0 is the start of everything.
    rank_E = np.unique(tokens_E, return_inverse=True)[1].astype(np.int64) + 1
    depth = 1
    while depth < LONGEST:
        earlier_E = np.concatenate([np.zeros(min(depth, count), np.int64), rank_E[:-depth]])[:count]
        rank_E = np.unique(rank_E * (count + 2) + earlier_E, return_inverse=True)[1].astype(np.int64) + 1
        depth *= 2
    positions = np.flatnonzero(tokens_E != GAP)
    positions = positions[positions > 0]
    return positions[np.argsort(rank_E[positions - 1], kind="stable")].astype(np.uint32)


def _ranked(counts: dict[int, int]) -> list[tuple[int, int]]:
    """Most often first; among equals the latest."""
    latest_first = list(reversed(counts.items()))
    latest_first.sort(key=lambda item: -item[1])
    return latest_first
