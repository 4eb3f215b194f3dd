"""Keys and values that outlive the text and the run that computed them: what an engine asks of their keeper.

Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from specexec.model.cache import KVCache


class Prefixes(Protocol):
    """Beginnings of texts, kept by their token ids. What is given back has the bits that were kept."""

    def known(self, tokens: Items[int]) -> int:
        """How many of these tokens the target need not read."""

    def fill(self, tokens: Items[int], caches: dict[object, KVCache]) -> None:
        """Put in, by model, what is kept of the beginning of `tokens`, where that is more than a cache holds of it."""

    def keep(self, caches: Mapping[object, KVCache]) -> None:
        """Keep what these hold; what cannot be kept is said, and costs time alone."""


class NoPrefixes:
    """Keeps nothing."""

    def known(self, tokens: Items[int]) -> int:
        return 0

    def fill(self, tokens: Items[int], caches: dict[object, KVCache]) -> None:
        pass

    def keep(self, caches: Mapping[object, KVCache]) -> None:
        pass
