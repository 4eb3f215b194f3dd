"""Texts remembered by their endings: which tokens followed this context, for every match length. Knows tokens only.

Two stores answer the same question. `Recent` learns token by token and forgets the least recently written n-grams;
`Settled` is a sorted array over a text that no longer changes (REST, He et al. 2023): 8 bytes a token kept, 20 in use.
E entries   N contexts   R rungs, longest first   L longest match
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

RUNGS = (1, 2, 3, 5, 8, 13)  # match lengths told apart; a match of 7 tokens counts as one of 5
LONGEST = RUNGS[-1]
DOWN = tuple(range(len(RUNGS)))[::-1]  # rungs, longest first
NOTHING = -1
GAP = 2**32 - 1  # stands between two texts; no token has this id
WORD = 4  # bytes of a token in a settled text
CODE, ENDING = np.dtype(">u4"), np.dtype(f"S{WORD * LONGEST}")
SAMPLE = 32  # occurrences looked at where a context has more
REMEMBERED = 1 << 14  # contexts whose followers are not counted again
LAST_OF_RUNG = np.array([RUNGS[rung] - 1 for rung in DOWN])
KEPT_RL = np.where(np.arange(LONGEST) <= LAST_OF_RUNG[:, None], GAP, 0).astype(np.uint32)
LAST_RL = (np.arange(LONGEST) == LAST_OF_RUNG[:, None]).astype(np.uint32)


class Match(NamedTuple):
    """What followed the last RUNGS[rung] tokens of a context: (token, times seen), most often and latest first."""

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


class Store(Protocol):
    """Anything that remembers what followed."""

    def matches(self, contexts: Items[Context]) -> list[list[Match]]:
        """For each context every rung at which it was seen, longest first."""
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
        for length in RUNGS[:rungs]:
            if context[length - 1] == NOTHING:
                break
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
        """Remember every token of `text` from index `start` on, each with what stands before it."""
        start = max(start, 1)
        context = context_of(text[max(0, start - LONGEST) : start])
        for token in text[start:]:
            self.add(context, token)
            context = then(context, token)

    def after(self, key: int) -> int | dict[int, int] | None:
        """What followed the n-gram of this hash: a token met once, or counts, the latest last."""
        return self._after.get(key)

    def matches(self, contexts: Items[Context]) -> list[list[Match]]:
        """For each context every rung at which it was seen, longest first."""
        return [self._matches(context) for context in contexts]

    def _matches(self, context: Context) -> list[Match]:
        found: list[Match] = []
        for rung in DOWN:
            known = self._after.get(hash(context[: RUNGS[rung]]))  # nothing was added with NOTHING in it
            if isinstance(known, int):
                found.append(Match(rung, [(known, 1)]))
            elif known is not None:
                found.append(Match(rung, _ranked(known)))
        return found


def follower(stores: Items[Recent], context: Context) -> Follower | None:
    """What followed the longest ending that one of the stores knows, most often and latest; earlier stores first."""
    for rung in DOWN:
        key = hash(context[: RUNGS[rung]])
        for store in stores:
            known = store.after(key)
            if known is not None:
                return Follower(rung, known if isinstance(known, int) else _ranked(known)[0][0])
    return None


class Settled:
    """A text, GAPs between its parts, and its positions in the order of what stands before them, read backwards."""

    def __init__(self, tokens_E: NDArray[np.uint32], order_E: NDArray[np.uint32]) -> None:
        count = max(len(tokens_E) - 1, 0)
        if len(order_E) != count:
            order_E = sorted_positions(tokens_E)  # an older version left out where texts end
        self.tokens_E = tokens_E
        self._next = tokens_E[order_E].data  # what follows each ending, in their order
        self._order = order_E.astype(np.intp) - 1  # as searchsorted wants it: of the endings, not of the positions
        # Backwards, as big-endian codes, every ending is a piece of one array: LONGEST codes that compare as bytes do.
        codes_E = np.zeros(len(tokens_E) + LONGEST, CODE)
        codes_E[: len(tokens_E)] = (np.minimum(tokens_E, GAP - 1) + 1)[::-1]
        self._endings = np.ndarray((count,), ENDING, codes_E.data, max(len(tokens_E) - 1, 0) * WORD, (-WORD,))
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

    @property
    def order_E(self) -> NDArray[np.uint32]:
        """Positions from 1 on, by the tokens before them."""
        return (self._order + 1).astype(np.uint32)

    def matches(self, contexts: Items[Context]) -> list[list[Match]]:
        """For each context every rung at which it was seen, longest first; common ones are counted on a sample.

        All rungs of all contexts are looked up in one search.
        """
        found: list[list[Match]] = [[] for _ in contexts]
        if not contexts or not len(self._order):
            return found
        codes_NL = (np.array(contexts) + 1).astype(np.uint32)
        low_NRL = codes_NL[:, None] & KEPT_RL
        ends = np.stack([low_NRL, low_NRL + LAST_RL]).astype(CODE).view(ENDING)[..., 0]
        first_NR, last_NR = np.searchsorted(self._endings, ends, sorter=self._order)
        rows, downs = np.nonzero((codes_NL[:, LAST_OF_RUNG] > 0) & (first_NR < last_NR))
        ranges = zip(
            rows.tolist(), downs.tolist(), first_NR[rows, downs].tolist(), last_NR[rows, downs].tolist(), strict=True
        )
        for row, down, first, last in ranges:
            if followers := self._followers(first, last):
                found[row].append(Match(DOWN[down], followers))
        return found

    def _followers(self, first: int, last: int) -> list[tuple[int, int]]:
        """What stands after the contexts in one range of the order, counted once while it is asked about often."""
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
    latest_first.sort(key=lambda item: -item[1])
    return latest_first
