"""What retrieval searches: the texts being written, the model's earlier ones and an indexed corpus. No files.

The past is two stores: what was loaded, settled, and what this process wrote since, recent.   E entries
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from specexec.drafters.retrieval.hit_rates import Hits
from specexec.drafters.retrieval.suffix_index import LONGEST, RUNGS, Context, Recent, Settled
from specexec.learned import sound
from specexec.text.sequence import Sequence
from specexec.tree.tree import Floats

HORIZONS = ("conversation", "past", "corpus")
STANDINGS = 6
RECYCLED_RUNGS = 3  # off the text's path a choice says something about its last few tokens only
PAST_LIMIT = 1 << 18  # tokens of earlier texts that are kept, the latest: 2 MiB, sorted in half a second


@dataclass
class _Text:
    """One text as far as it was read."""

    store: Recent = field(default_factory=Recent)
    length: int = 0


@dataclass
class Memory:
    """Lives as long as an engine; `pack` and `unpack` carry the past and what its guesses were worth across runs."""

    corpus: Settled = field(default_factory=lambda: Settled.of([]))
    settled: Settled = field(default_factory=lambda: Settled.of([]))
    recent: Recent = field(default_factory=Recent)
    hits: Hits = field(default_factory=lambda: Hits(prior()))
    written: deque[Items[int]] = field(default_factory=deque)  # as much as `pack` may keep
    written_tokens: int = 0
    texts: WeakKeyDictionary[Sequence, _Text] = field(default_factory=WeakKeyDictionary)

    def text_of(self, sequence: Sequence) -> Recent:
        """What followed what in one text, up to its present end."""
        text = self.texts.get(sequence)
        if text is None:
            text = self.texts[sequence] = _Text()
        if text.length < len(sequence.tokens):
            text.store.extend(sequence.words(), start=text.length)
            text.length = len(sequence.tokens)
        return text.store

    def recycle(self, context: Context, chosen: int) -> None:
        """The target's choice at a node that its text did not take."""
        self.recent.add(context, chosen, RECYCLED_RUNGS)

    def write(self, prompt: Items[int], answer: Items[int]) -> None:
        """A finished answer: only its own tokens can be guessed again, the prompt's end is context."""
        text = [*prompt[-LONGEST:], *answer]
        self.recent.extend(text, start=len(text) - len(answer))
        self.written.append(text)
        self.written_tokens += len(text) + 1
        while self.written_tokens - len(self.written[0]) - 1 >= PAST_LIMIT:
            self.written_tokens -= len(self.written.popleft()) + 1

    def forget_past(self) -> None:
        """As if nothing had been written yet; the corpus and what guesses were worth stay."""
        self.recent, self.settled, self.written, self.written_tokens = Recent(), Settled.of([]), deque(), 0

    def pack(self, limit: int = PAST_LIMIT) -> dict[str, NDArray[np.generic]]:
        """Everything worth keeping, as arrays: the latest `limit` tokens of the past, sorted anew, and the counts."""
        written = [Settled.of([text]).tokens_E for text in self.written]
        past = Settled.joined(np.concatenate([self.settled.tokens_E, *written])[-limit:])
        return {
            "tokens": past.tokens_E,
            "order": past.order_E,
            "seen": self.hits.seen_RC.astype(np.float32),
            "hit": self.hits.hit_RC.astype(np.float32),
        }

    def unpack(self, arrays: Mapping[str, NDArray[np.generic]], vocabulary: int) -> None:
        """Take up what an earlier run packed. Counts of another shape (an older version's) are left.

        Raises ValueError for what no run packs.
        """
        settled, shape = Settled.kept(arrays["tokens"], arrays["order"], vocabulary), self.hits.seen_RC.shape
        if arrays["seen"].shape == arrays["hit"].shape == shape:
            seen_RC, hit_RC = (sound(arrays[name], shape, name) for name in ("seen", "hit"))
            self.hits.seen_RC, self.hits.hit_RC = seen_RC, hit_RC
        self.settled = settled


def cells_of(horizon: int, rung: int, fallback: bool) -> range:
    """Kinds of evidence by standing: where it was found, how long the match, and if a longer match exists."""
    first = (horizon * len(RUNGS) + rung) * STANDINGS * 2 + fallback
    return range(first, first + 2 * STANDINGS, 2)


def prior() -> Floats:
    """Chance of a hit in each cell before anything was counted: long matches are mostly right, later places rarely."""
    chance_HRSF = np.zeros((len(HORIZONS), len(RUNGS), STANDINGS, 2))
    of_rung = np.array([0.1, 0.3, 0.5, 0.7, 0.85, 0.95])
    of_standing = np.array([0.95, 0.9, 0.7, 0.4, 0.15, 0.05])
    chance_HRSF[:] = (of_rung[:, None] * of_standing)[None, :, :, None] * np.array([1.0, 0.15])
    return chance_HRSF.reshape(-1)
