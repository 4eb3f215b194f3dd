"""Texts that are only read go through the target many in a sweep: arithmetic on lengths. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

MOST_ROWS = 8192  # of one sweep: arithmetic is the limit by then, and more rows would only take memory


def in_sweeps(texts: Iterable[list[int]], fits: Callable[[list[int]], bool]) -> Iterator[list[list[int]]]:
    """The texts in their order, as many together as go into one sweep.

    `fits` says whether texts of so many tokens each do; a single text always does.
    """
    together: list[list[int]] = []
    for text in texts:
        sizes = [len(one) for one in (*together, text)]
        if together and (sum(sizes) > MOST_ROWS or not fits(sizes)):
            yield together
            together = []
        together.append(text)
    if together:
        yield together
