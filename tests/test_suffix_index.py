"""The suffix stores against a search through every position of every text."""

from collections import Counter
from collections.abc import Sequence as Items

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specexec.drafters.retrieval.suffix_index import (
    GAP,
    LONGEST,
    RUNGS,
    Match,
    Recent,
    Settled,
    SuffixStore,
    context_of,
    then,
)

TEXT = st.lists(st.integers(0, 3), max_size=40)
TEXTS = st.lists(TEXT, max_size=4)


def searched(texts: Items[Items[int]], context: Items[int]) -> dict[int, Counter[int]]:
    """For each rung at which the end of `context` occurs: how often each token followed it."""
    found: dict[int, Counter[int]] = {}
    for rung, length in enumerate(RUNGS):
        if length > len(context):
            continue
        ending = list(context[-length:])
        counts = Counter(
            text[i] for text in texts for i in range(length, len(text)) if list(text[i - length : i]) == ending
        )
        if counts:
            found[rung] = counts
    return found


def told(matches: list[Match]) -> dict[int, dict[int, int]]:
    return {match.rung: dict(match.followers) for match in matches}


def check(store: SuffixStore, texts: Items[Items[int]], context: Items[int]) -> None:
    """A rung that is left out says what the next longer one says."""
    matches, counted = store.matches(context_of(context)), searched(texts, context)
    rungs = [match.rung for match in matches]
    assert rungs == sorted(set(rungs), reverse=True)
    assert max(counted, default=None) == max(rungs, default=None)
    for rung, followers in counted.items():
        assert told(matches)[min(longer for longer in rungs if longer >= rung)] == followers
    for match in matches:
        counts = [count for _, count in match.followers]
        assert counts == sorted(counts, reverse=True)


@given(TEXTS, TEXT)
def test_a_settled_text_is_found_by_every_ending(texts: list[list[int]], context: list[int]) -> None:
    check(Settled.of(texts), texts, context)


@given(TEXTS, TEXT)
def test_a_recent_text_is_found_by_every_ending(texts: list[list[int]], context: list[int]) -> None:
    store = Recent()
    for text in texts:
        store.extend(text)
    check(store, texts, context)


@given(TEXT, st.integers(0, 40), TEXT)
def test_a_text_may_arrive_in_parts(text: list[int], cut: int, context: list[int]) -> None:
    store = Recent()
    store.extend(text[:cut])
    store.extend(text, start=len(text[:cut]))
    check(store, [text], context)


@given(TEXT, st.integers(0, 3))
def test_a_context_grows_token_by_token(text: list[int], token: int) -> None:
    assert then(context_of(text), token) == context_of([*text, token])
    assert len(context_of(text)) == LONGEST


def test_the_latest_of_two_equals_comes_first() -> None:
    store = Recent()
    store.extend([1, 2, 1, 3])
    assert store.matches(context_of([1]))[0].followers == [(3, 1), (2, 1)]


def test_memory_is_bounded_and_the_least_recent_goes_first() -> None:
    store = Recent(limit=12, followers=2)
    store.extend(list(range(100)))
    assert len(store) == 12
    assert not store.matches(context_of([5]))
    assert store.matches(context_of([98]))
    for token in range(10):
        store.add(context_of([7]), token)
    assert len(store.matches(context_of([7]))[0].followers) == 2


@given(st.lists(st.tuples(TEXT, st.integers(0, 3), st.integers(1, len(RUNGS))), max_size=30), st.integers(1, 40))
def test_a_shorter_ending_is_never_forgotten_before_a_longer_one(
    written: list[tuple[list[int], int, int]], limit: int
) -> None:
    """A look-up stops at the first ending that is not known."""
    store = Recent(limit)
    for text, token, rungs in written:
        context = context_of(text)
        store.add(context, token, rungs)
        known = [store.after(hash(context[:length])) is not None for length in RUNGS if length <= len(text)]
        assert known == sorted(known, reverse=True)


@given(TEXTS, TEXT)
def test_a_path_is_looked_up_token_by_token(texts: list[list[int]], path: list[int]) -> None:
    """What a node finds from what its parent found is what it finds alone."""
    store, context = Settled.of(texts), context_of([])
    for token in path:
        context = then(context, token)
        found = store.matches(context)
    if path:
        assert found == Settled.of(texts).matches(context)


def test_a_common_context_is_counted_on_a_sample() -> None:
    store = Settled.of([[1, 2, 1, 2, 1, 2, 1, 3] * 1000])
    (match,) = store.matches(context_of([1]))
    assert match.followers[0][0] == 2
    assert sum(count for _, count in match.followers) < 200


@pytest.mark.parametrize("texts", [[], [[]], [[7]], [[], [7], []]])
def test_too_little_text_has_no_matches(texts: list[list[int]]) -> None:
    assert Settled.of(texts).matches(context_of([7])) == []


def test_arrays_are_all_there_is_to_keep() -> None:
    store = Settled.of([[1, 2, 3, 1, 2], [2, 3]])
    again = Settled(np.array(store.tokens_E), np.array(store.order_E))
    assert again.matches(context_of([1, 2])) == store.matches(context_of([1, 2]))


def test_an_order_of_an_older_version_is_sorted_anew() -> None:
    store = Settled.of([[1, 2, 3, 1, 2], [2, 3]])
    without_ends = store.order_E[store.tokens_E[store.order_E] != GAP]
    assert (Settled(store.tokens_E, without_ends).order_E == store.order_E).all()
