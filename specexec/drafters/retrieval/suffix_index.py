"""Texts indexed by their suffixes: which tokens followed this context, for every match length. Knows tokens only.

Two stores answer the same question. `Recent` learns token by token and forgets the least recently written n-grams;
`Settled` is a sorted array over a text that no longer changes (REST, He et al. 2023): 8 bytes a token kept, 16 in use.
E entries
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Items
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

RUNGS = (1, 2, 3, 5, 8, 13)  # match lengths that are distinguished; a match of 7 tokens counts as one of 5
LONGEST = RUNGS[-1]
DOWN = tuple(range(len(RUNGS)))[::-1]  # rungs, longest first
NOTHING = -1
GAP = 2**32 - 1  # between two texts; no token has this id
SAMPLE = 32  # occurrences looked at where a context has more
TIMES = itemgetter(1)
REMEMBERED = 1 << 12  # contexts that are not looked up again: some kB each at most


Range: TypeAlias = tuple[int, int]  # from, to
NOWHERE: Range = (-1, -1)


class Match(NamedTuple):
    """What followed the last RUNGS[rung] tokens of a context: (token, times seen), most often and latest first.

    Shorter endings that say the same are left out.
    """

    rung: int
    followers: list[tuple[int, int]]


Context: TypeAlias = tuple[int, ...]  # the end of a text: LONGEST tokens, latest first, NOTHING before its beginning


def context_of(text: Items[int]) -> Context:
    """The end of any text."""
    ending = tuple(text[: -LONGEST - 1 : -1])
    return ending + (NOTHING,) * (LONGEST - len(ending))


def then(context: Context, token: int) -> Context:
    """The context one token later."""
    return (token, *context[:-1])


class Follower(NamedTuple):
    """The likeliest next token, and the rung of the longest match that says so."""

    rung: int
    token: int


class SuffixStore(Protocol):
    """Anything that remembers what followed."""

    def matches(self, context: Context) -> list[Match]:
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
        for length in RUNGS[:rungs][::-1]:  # so that a shorter one is never forgotten before a longer one
            if context[length - 1] == NOTHING:
                continue
            key = hash(context[:length])
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
        """Remember every token of `text` from index `start` on, each with the tokens before it."""
        start = max(start, 1)
        context = context_of(text[max(0, start - LONGEST) : start])
        for token in text[start:]:
            self.add(context, token)
            context = then(context, token)

    def after(self, key: int) -> int | dict[int, int] | None:
        """What followed the n-gram of this hash: a token met once, or counts, the latest last."""
        return self._after.get(key)

    def matches(self, context: Context) -> list[Match]:
        """Every rung at which the context was seen, longest first."""
        known = [self._after.get(hash(context[:length])) for length in RUNGS]  # nothing was added with NOTHING in it
        found, said = list[Match](), None
        for rung in DOWN:
            here = known[rung]
            if here is not None and here != said:
                found.append(Match(rung, [(here, 1)] if isinstance(here, int) else _ranked(here)))
            said = here
        return found


def follower(stores: Items[Recent], context: Context, least: int = 0) -> Follower | None:
    """What followed the longest ending that one of the stores knows, most often and latest; earlier stores first.

    None where no match of rung `least` or above is known. Who knows a longer ending knows the shorter ones of it too.
    """
    shortest = hash(context[: RUNGS[least]])
    knowing = [store for store in stores if store.after(shortest) is not None]
    for rung in DOWN[: len(DOWN) - least] if knowing else ():
        key = hash(context[: RUNGS[rung]])
        for store in knowing:
            known = store.after(key)
            if known is not None:
                return Follower(rung, known if isinstance(known, int) else _ranked(known)[0][0])
    return None


class Settled:
    """A text, GAPs between its parts, and its positions in the order of the tokens before them, read backwards.

    Every ending is a range of that order, and the range of an ending with one more token behind it follows from its own
    by counting (backward search, Ferragina and Manzini 2000): a node of a tree is looked up from what its parent found.
    """

    def __init__(self, tokens_E: NDArray[np.uint32], order_E: NDArray[np.uint32]) -> None:
        count = max(len(tokens_E) - 1, 0)
        if len(order_E) != count:
            order_E = sorted_positions(tokens_E)  # an older version left out where texts end
        self.tokens_E, self.order_E = tokens_E, order_E
        next_E = tokens_E[order_E]
        self._next = next_E.data  # what follows each ending, in their order
        self._places = np.argsort(next_E, kind="stable").astype(np.uint32).data  # where each token follows, ascending
        self._first = int(tokens_E[0]) if count else GAP  # follows nothing
        known_E = next_E[next_E != GAP].astype(np.int64)
        size = 0 if self._first == GAP else self._first + 2
        self._begin = np.cumsum(np.bincount(known_E + 1, minlength=size)).data  # of each token's places
        self._known: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._ranges: dict[Context, list[Range]] = {}

    @staticmethod
    def kept(tokens_E: NDArray[np.generic], order_E: NDArray[np.generic], vocabulary: int) -> Settled:
        """Of arrays from a file. Raises ValueError for those that hold no text in ids below `vocabulary`."""
        for array in (tokens_E, order_E):
            if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and int(array.min()) < 0):
                raise ValueError(f"it holds {array.dtype} of shape {array.shape} where tokens or places are expected")
        ids = tokens_E[tokens_E != GAP]
        if ids.size and int(ids.max()) >= vocabulary:
            raise ValueError(f"it names token {int(ids.max())}, the model has {vocabulary}")
        if order_E.size and int(order_E.max()) >= len(tokens_E):
            raise ValueError(f"it names place {int(order_E.max())} of {len(tokens_E)}")
        return Settled(tokens_E.astype(np.uint32), order_E.astype(np.uint32))

    @staticmethod
    def of(texts: Iterable[Items[int]]) -> Settled:
        """Sort the positions of all texts by their contexts."""
        parts = [np.array([*text, GAP], np.uint32) for text in texts]
        return Settled.joined(np.concatenate(parts) if parts else np.zeros(0, np.uint32))

    @staticmethod
    def joined(tokens_E: NDArray[np.uint32]) -> Settled:
        """The same for texts that are in one array, a GAP behind each."""
        return Settled(tokens_E, sorted_positions(tokens_E))

    def __len__(self) -> int:
        return len(self.tokens_E)

    def matches(self, context: Context) -> list[Match]:
        """Every rung at which the context was seen, longest first; what followed common ones is counted on a sample."""
        ranges, said, found = self._ranges_of(context), NOWHERE, list[Match]()
        for rung in DOWN:
            if RUNGS[rung] < len(ranges) and ranges[RUNGS[rung]] != said:
                said = ranges[RUNGS[rung]]
                if followers := self._followers(*said):
                    found.append(Match(rung, followers))
        return found

    def _ranges_of(self, context: Context) -> list[Range]:
        """The ranges of its last 0, 1, 2, … tokens in the order, for as many as were ever seen."""
        known = self._ranges.get(context[1:])
        if known is None:
            known = [(0, len(self._next))]
            for token in reversed(context[1:]):
                known = self._then(known, token)
        ranges = self._then(known, context[0])
        if len(self._ranges) >= REMEMBERED:
            self._ranges.clear()
        self._ranges[context[:-1]] = ranges[:LONGEST]
        return ranges

    def _then(self, ranges: list[Range], token: int) -> list[Range]:
        """The same one token later."""
        if not 0 <= token < len(self._begin) - 1:
            return ranges[:1]
        low, high = self._begin[token], self._begin[token + 1]
        # The first token of all follows nothing, but is an ending too, and the least of those that end alike.
        longer = [ranges[0], (low + (self._first < token), high + (self._first <= token))]
        later, said = int(self._first <= token), NOWHERE
        for within in ranges[1:]:
            if within != said:  # else nothing else ends so, and one token more does not change that
                said = first, last = within
                if last - first == 1 and self._next[first] != token:
                    break
                low = bisect_left(self._places, first, low, high)
                high = bisect_left(self._places, last, low, high)
                if low == high:
                    break
                found = low + later, high + later
            longer.append(found)
        return longer

    def _followers(self, first: int, last: int) -> list[tuple[int, int]]:
        """What follows the contexts in one range of the order, counted once while it is asked about often."""
        if last - first == 1:
            return [] if self._next[first] == GAP else [(self._next[first], 1)]
        found = self._known.get((first, last))
        if found is None:
            counts: dict[int, int] = {}
            for token in self._next[first : last : max(1, (last - first) // SAMPLE)]:
                counts[token] = counts.get(token, 0) + 1
            counts.pop(GAP, None)
            found = _ranked(counts)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[first, last] = found
        return found


def sorted_positions(tokens_E: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """All positions but the first, by the tokens before them: latest first, LONGEST deep (prefix doubling)."""
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
    return (np.argsort(rank_E[:-1], kind="stable") + 1).astype(np.uint32)


def _ranked(counts: dict[int, int]) -> list[tuple[int, int]]:
    """Most often first; among equals the latest."""
    latest_first = list(reversed(counts.items()))
    latest_first.sort(key=TIMES, reverse=True)  # stable
    return latest_first
