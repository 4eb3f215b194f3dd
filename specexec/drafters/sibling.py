"""A smaller model of the same family guesses. Its own tree cache holds one row for every node that it has read.

N nodes   C candidates   V vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from specexec.drafters.calibration import Calibrated, log_softmax
from specexec.drafters.cascade import Cascade
from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.ranking import Named, Ranking
from specexec.drafters.read_rows import Along, AskedBatch, Below, evidence
from specexec.drafters.trimmed_head import TrimmedHead
from specexec.learned import Arrays
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows
from specexec.sampling.processors import History
from specexec.sampling.scores import constrained
from specexec.sizes import BEAMS, CANDIDATES, PIECE
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree


class DraftLM(Protocol):
    """A model that guesses, as a TreeLM is one."""

    @property
    def vocabulary(self) -> int:
        """Rows of its head."""
        ...

    @property
    def context(self) -> int:
        """The longest text that it can read, in tokens."""
        ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, parts: list[Rows]) -> list[Tensor]:
        """Hidden states of the rows of each part, [R, H]; the rows are nodes of their caches from now on."""
        ...

    def head(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] in float32."""
        ...


class SiblingDrafter(Calibrated):
    """Guesses by any causal LM that shares the target's vocabulary of `vocabulary` ids; it names none of `never`.

    `ids`: what the rows of its head stand for, where that is not 0, 1, 2, … With a `window` it sees of a text the first
    tokens and at least so many last ones.
    """

    reads_its_own = False
    """Whether rows of guesses are computed from what their parents' rows gave (heads/head.py)."""

    def __init__(
        self,
        lm: DraftLM,
        vocabulary: int,
        ranking: Ranking | None = None,
        name: str = "sibling",
        trimmed: TrimmedHead | None = None,
        cascade: Cascade | None = None,
        never: Iterable[int] = (),
        ids: Items[int] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self._window = name, window
        self.ranking = ranking or Ranking()
        self.context = lm.context
        self.lm = lm
        self._named = Named(lm.vocabulary, vocabulary, never, lm.device, ids)
        self._trimmed = trimmed
        self.cascade = cascade or Cascade()
        self._below: WeakKeyDictionary[Sequence, Below] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """The nodes that were read along."""
        growing = [ask for ask in asks if ROOT not in ask.nodes]
        found = [replace(ask, nodes=[*self._below[ask.sequence].read(ask.tree, ask.nodes)]) for ask in growing]
        return [ask for ask in found if ask.nodes]

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """At most one forward pass, for all asked nodes of all sequences that were not read yet."""
        began = time.perf_counter()
        read = self._read(asks)
        said: list[Guesses] = []
        for together in _small(asks):  # logits are large: those of a few rows at a time
            hidden_NH = torch.cat([self._below[ask.sequence].take(ask.nodes) for ask in together])
            logits = self._logits(hidden_NH).split([len(ask.nodes) for ask in together])
            said += [self._best(*one, width) for one in zip(together, logits, strict=True)]
        if not any(ROOT in ask.nodes for ask in asks):  # those read the text first
            self.cascade.learn(read, sum(len(ask.nodes) for ask in asks), time.perf_counter() - began)
        pieces = iter(said)
        return [_joined([next(pieces) for _ in _spans(ask)]) for ask in asks]

    def _read(self, asks: list[Ask]) -> int:
        """Hidden states of the nodes that were not read yet, and of what probably follows them. Says how many rows."""
        parts = [(ask.sequence, part) for ask in asks if (part := self._rows(ask)).tokens]
        if not parts:
            return 0
        for (sequence, part), hidden_RH in zip(parts, self.lm.forward([part for _, part in parts]), strict=True):
            first = len(part.cache.parents) - len(part.tokens)
            self._below[sequence].keep_hidden(first, hidden_RH, self.reads_its_own)
        return sum(len(part.tokens) for _, part in parts)

    def _rows(self, ask: Ask) -> Rows:
        """New rows to process; asking about ROOT brings the text up to date first."""
        sequence, cache, new = ask.sequence, ask.sequence.cache(self.lm), ask.nodes
        settled = 0
        if ask.nodes == [ROOT]:
            self._forget(sequence)
            cache.forget_nodes()
            catch_up(self.lm, sequence, cache, self._window, lambda new: self._text(sequence, cache, new))
            tokens = list(sequence.pending(self.lm))
            if self._trimmed is not None:
                self._trimmed.meet(sequence.words())
            parents, settled = list(range(-1, len(tokens) - 1)), len(tokens)
            self._below[sequence] = Below.text(len(tokens) - 1)
        else:
            below = self._below[sequence]
            new, cells = below.claim(ask.tree, ask.nodes, len(cache.parents))
            self.cascade.count(cells, True, bool(sequence.sampling.temperature))
            tokens = ask.tree.tokens_N[new].tolist()
            parents = below.rows(ask.tree.parents_N[new]).tolist()
        below = self._below[sequence]
        levels = min(sequence.room - 1, self.context - len(sequence.tokens))
        chains = self.cascade.chains(ask, new, levels, len(below.along))
        for row, chain in zip(below.rows([*chains]).tolist(), chains.values(), strict=True):
            for token, cell in chain:
                below.along[row, token] = Along(len(cache.parents) + len(tokens), cell)
                tokens.append(token)
                parents.append(row)
                row = len(cache.parents) + len(tokens) - 1
        return Rows(cache, tokens, parents, settled)

    def _text(self, sequence: Sequence, cache: KVCache, tokens: Items[int]) -> Rows:
        """The next tokens of a text."""
        return Rows.text(cache, tokens)

    def _forget(self, sequence: Sequence) -> Below:
        """What was read below a text is of no use any more; nor are rows that were not asked about."""
        below = self._below.pop(sequence, Below.text(ROOT))
        self.cascade.count(below.missed(), False, bool(sequence.sampling.temperature))
        return below

    def _best(self, ask: Ask, logits_NS: Tensor, width: int) -> Guesses:
        sequence, length = ask.sequence, len(ask.sequence.tokens)
        positions = [length] if ask.nodes == [ROOT] else (length + 1 + ask.tree.depth_N[ask.nodes]).tolist()
        histories: list[History] = []
        if sequence.sampling.penalised:
            above = sequence.history_on(self._named.device)
            histories = [above.after(ask.tree.tokens_N[ask.tree.path(node)].tolist()) for node in ask.nodes]
        found = self._named.among(sequence, logits_NS, self._trimmed.ids_S if self._trimmed else None)
        logits_NV = constrained(found.logits_NV, sequence.sampling, sequence.parse, ask.tree, ask.nodes)
        scores_NV = self.ranking.scores(logits_NV, sequence.sampling, found.noise, positions, histories)
        best = scores_NV.topk(min(max(width, CANDIDATES), scores_NV.shape[1]))
        tokens_NC, scores_NC = found.tokens(best.indices).cpu().numpy(), best.values.double().cpu().numpy()
        self._below[sequence].asked.append(AskedBatch(np.array(ask.nodes), tokens_NC, scores_NC))
        if self.ranking.tau is not None:  # a fixed rule, over the whole vocabulary
            log_probs_NV = (scores_NV / self.ranking.tau).log_softmax(-1)
            log_probs_NC = log_probs_NV.gather(-1, best.indices).double().cpu().numpy()
        else:
            calibration = self.calibration(sequence.sampling)
            log_probs_NC = log_softmax(scores_NC / calibration.tau) + np.log1p(-calibration.miss)
        return Guesses(tokens_NC[:, :width], log_probs_NC[:, :width])

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        if self._trimmed is not None:
            return self._trimmed.logits(hidden_NH)
        return self._named.cut(self.lm.head(hidden_NH))

    def pack(self) -> dict[str, Floats]:
        """Its calibration; of a trimmed head, what the target chose most."""
        return super().pack() | ({} if self._trimmed is None else {"chosen": self._trimmed.pack()})

    def unpack(self, arrays: Arrays) -> None:
        """The way back. Raises ValueError for what is not its own."""
        super().unpack(arrays)
        if self._trimmed is not None:
            self._trimmed.unpack(arrays)

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Commit the rows of the new text as far as they exist; keep those of the nodes below it."""
        below = self._forget(sequence)
        self._learn(sequence, tree, choices_M, below.asked)
        if self._trimmed is not None:
            self._trimmed.count(choices_M)
        cache = sequence.cache(self.lm)
        path = cache.path(sequence.tokens[len(cache) :])
        if kept is None:
            cache.commit(path)
            return
        # The whole new text has rows; that of its last token, which no cache counts as text, stays a node.
        assert len(cache) + len(path) == len(sequence.tokens), "what lies below was guessed by asking along the path"
        keep, self._below[sequence] = below.moved_on(path[-1], kept)  # the next sweep will answer what was asked there
        cache.commit(path[:-1], keep)

    def _learn(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], batches: list[AskedBatch]) -> None:
        """Compare what was guessed with what the target chose, at every node that both looked at."""
        seen = evidence(tree, choices_M, batches)
        if seen is not None:
            self.calibration(sequence.sampling).learn(*seen)


def catch_up(
    lm: DraftLM, sequence: Sequence, cache: KVCache, window: int | None, rows: Callable[[Items[int]], Rows]
) -> None:
    """Read what is long in pieces, where a window drops rows in between; `rows` makes them of the next tokens."""
    cache.window = window
    while window is not None and len(pending := sequence.pending(lm)) > PIECE:
        lm.forward([rows(pending[:PIECE])])
        cache.commit(range(PIECE))


def _small(asks: list[Ask]) -> Iterator[list[Ask]]:
    """The same in groups of at most BEAMS nodes; a larger ask is cut into pieces."""
    group: list[Ask] = []
    for piece in (replace(ask, nodes=ask.nodes[span]) for ask in asks for span in _spans(ask)):
        if group and sum(len(one.nodes) for one in group) + len(piece.nodes) > BEAMS:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _spans(ask: Ask) -> list[slice]:
    return [slice(first, first + BEAMS) for first in range(0, len(ask.nodes), BEAMS)]


def _joined(pieces: list[Guesses]) -> Guesses:
    return Guesses(
        np.concatenate([one.tokens_NK for one in pieces]), np.concatenate([one.log_probs_NK for one in pieces])
    )
