"""How deep JSON is nested, checked before parsers that fail on deep nesting, each in its own way."""

from __future__ import annotations

from itertools import chain

MOST_LEVELS = 100  # of lists and objects in each other


def deeper(value: object, levels: int = MOST_LEVELS) -> bool:
    """Whether lists and objects hold each other more than `levels` deep."""
    inside = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        parts = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in inside)
        inside = [part for part in parts if isinstance(part, dict | list)]
    return bool(inside)
