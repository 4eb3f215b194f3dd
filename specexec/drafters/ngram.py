"""Guesses from earlier text: this conversation, this model's earlier answers, an indexed corpus.

One suffix store with three horizons (Hierarchy Drafting, Cho et al. 2025), longest match first; every sweep feeds it,
with the target's choices at nodes the text did not take too (Token Recycling, Luo et al. 2024). How much a match is
worth is counted, not assumed: hits by horizon, match length and standing. Knows no model and no file.
N nodes   K children   M = N + 1 rows: the end of the text, then the nodes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.retrieval.memory import STANDINGS, Memory, cells_of
from specexec.drafters.retrieval.suffix_index import LONGEST, SAMPLE, Context, SuffixStore, context_of, then
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

if TYPE_CHECKING:
    from specexec.drafters.kit import DrafterKit

WIDTH = 8  # children worth naming for one node
MOST_NODES = 256  # of one tree: those the text was most likely to meet teach, the others cost time
UNBOUNDED = 2**31 - 1
LATER = [min(place + 3, STANDINGS - 1) for place in range(SAMPLE * 2)]  # standings of those after the first
RUNG = itemgetter(0)
TAU = 0.5  # counted chances are not the target's own distribution: soften what the noise makes of them


@dataclass(frozen=True)
class _Said:
    """What was said about one node, kept until the target has chosen."""

    tokens_K: Ints
    cells_K: Ints


@dataclass
class _Reading:
    """The contexts of the tree that grows below one text, which had `length` tokens."""

    length: int = 0
    contexts: dict[int, Context] = field(default_factory=dict)
    said: dict[int, _Said] = field(default_factory=dict)

    def read_on(self, sequence: Sequence) -> None:
        """From the present end of the text on; nothing is known below it yet."""
        self.length = len(sequence.tokens)
        self.contexts = {ROOT: context_of(sequence.words(-LONGEST))}
        self.said = {}


def make(kit: DrafterKit) -> NgramDrafter:
    """The drafter of an engine: it reads what the engine remembers, and names what the target may write."""
    return NgramDrafter(kit.memory, kit.names.rows)


class NgramDrafter:
    """Retrieval alone, or joined to a model by `+`. Costs no weights, and up to a tenth of a millisecond a node."""

    name = "ngram"
    context = UNBOUNDED

    def __init__(self, memory: Memory | None = None, vocabulary: int = UNBOUNDED) -> None:
        """It names ids below `vocabulary`."""
        self._vocabulary = vocabulary
        self.memory = memory or Memory()
        self._readings: WeakKeyDictionary[Sequence, _Reading] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: what a node costs has nothing to do with others."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """What followed the longest ending of each node's path, then the shorter ones."""
        return [self._answer(ask, self._found(ask, min(width, WIDTH)), min(width, WIDTH)) for ask in asks]

    def _found(self, ask: Ask, width: int) -> list[dict[int, int]]:
        memory = self.memory
        stores: list[tuple[int, SuffixStore]] = [(0, memory.text_of(ask.sequence))]
        stores += [(1, store) for store in (memory.recent, memory.settled) if len(store)]
        stores += [(2, memory.corpus)] if len(memory.corpus) else []
        return [_recall(stores, context, width) for context in self._contexts(ask)]

    def _contexts(self, ask: Ask) -> list[Context]:
        reading = self._readings.get(ask.sequence)
        if reading is None:
            reading = self._readings[ask.sequence] = _Reading()
        if ROOT in ask.nodes:
            reading.read_on(ask.sequence)
        known, parents_N, tokens_N = reading.contexts, ask.tree.parents_N, ask.tree.tokens_N
        for node in ask.nodes:
            if node != ROOT:
                known[node] = then(known[int(parents_N[node])], int(tokens_N[node]))
        return [known[node] for node in ask.nodes]

    def _answer(self, ask: Ask, found: list[dict[int, int]], width: int) -> Guesses:
        """The cells of the evidence for each node's children as chances."""
        tokens = [[*one, *[0] * (width - len(one))] for one in found]
        cells = [[*one.values(), *[-1] * (width - len(one))] for one in found]
        tokens_NK, cells_NK = (np.array(rows, np.int64).reshape(-1, width) for rows in (tokens, cells))
        strange_NK = tokens_NK >= min(self._vocabulary, ask.sequence.noise.vocabulary)
        tokens_NK[strange_NK], cells_NK[strange_NK] = 0, -1
        said = self._readings[ask.sequence].said
        for row, node in enumerate(ask.nodes):
            said[node] = _Said(tokens_NK[row], cells_NK[row])
        if (parse := ask.sequence.parse) is not None:
            allowed_NV = parse.allowed([ask.tree.spelled(node) for node in ask.nodes], int(tokens_NK.max()) + 1)
            cells_NK[~np.take_along_axis(allowed_NV.numpy(), tokens_NK, axis=1)] = -1
        sampled = bool(ask.sequence.sampling.temperature)
        chances_NK = self.memory.hits.chances(cells_NK, sampled)
        with np.errstate(divide="ignore"):
            if sampled:
                return Guesses(tokens_NK, with_noise(chances_NK, _noise(ask, tokens_NK)))
            return Guesses(tokens_NK, np.log(chances_NK))

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Count the hits, take the choices off the path into the past, and a finished answer as a whole."""
        reading = self._readings.get(sequence)
        if reading is not None:
            likely = np.sort(np.argsort(-tree.reach_N, kind="stable")[:MOST_NODES])
            self._count(reading, bool(sequence.sampling.temperature), tree, likely, choices_M)
            self._recycle(reading, sequence, tree, likely, choices_M)
            contexts, said = reading.contexts, reading.said
            reading.read_on(sequence)
            new_name = {old: new for new, old in enumerate([] if kept is None else kept.tolist())}
            reading.contexts |= {new_name[old]: context for old, context in contexts.items() if old in new_name}
            reading.said = {new_name[old]: one for old, one in said.items() if old in new_name}
        if sequence.finish_reason is not None:
            self.memory.write(sequence.words()[: sequence.prompt_length], sequence.answer)

    def _count(self, reading: _Reading, sampled: bool, tree: TokenTree, likely: Ints, choices_M: list[int]) -> None:
        """What was said about each node against what the target chose there, weighted by the node's chance."""
        nodes = [ROOT, *likely.tolist()]
        said = [reading.said.get(ROOT if node == ROOT else int(tree.ids_N[node])) for node in nodes]
        known = [(node, one) for node, one in zip(nodes, said, strict=True) if one is not None]
        by_width: dict[int, list[tuple[int, _Said]]] = {}
        for node, one in known:
            by_width.setdefault(len(one.cells_K), []).append((node, one))
        reach = np.append(np.minimum(tree.reach_N, 0.0), 0.0)  # the last one answers for ROOT
        for rows in by_width.values():
            choices_N = np.array([choices_M[1 + node] for node, _ in rows])
            hit_NK = np.stack([one.tokens_K for _, one in rows]) == choices_N[:, None]
            cells_NK = np.stack([one.cells_K for _, one in rows])
            self.memory.hits.count(cells_NK, hit_NK, np.exp(reach[[node for node, _ in rows]]), sampled)

    def _recycle(
        self, reading: _Reading, sequence: Sequence, tree: TokenTree, likely: Ints, choices_M: list[int]
    ) -> None:
        written = sequence.tokens[reading.length :]
        on_text = {ROOT}
        for node in likely.tolist():
            parent, token, depth = int(tree.parents_N[node]), int(tree.tokens_N[node]), int(tree.depth_N[node])
            if parent in on_text and depth < len(written) and written[depth] == token:
                on_text.add(node)
            elif (above := reading.contexts.get(int(tree.ids_N[parent]) if parent != ROOT else ROOT)) is not None:
                self.memory.recycle(then(above, token), choices_M[1 + node])


def _recall(stores: list[tuple[int, SuffixStore]], context: Context, width: int) -> dict[int, int]:
    """Up to `width` tokens, and for each the cell of the best evidence: longest matches first, then nearer horizons."""
    evidence = [(match.rung, horizon, match.followers) for horizon, store in stores for match in store.matches(context)]
    evidence.sort(key=RUNG, reverse=True)  # stable
    found = dict[int, int]()
    for rung, horizon, followers in evidence:
        cells = cells_of(horizon, rung, fallback=rung < evidence[0][0])
        for place, (token, _) in enumerate(followers):
            if token not in found:
                found[token] = cells[LATER[place] if place else _lead(followers)]
                if len(found) == width:
                    return found
    return found


def _lead(followers: list[tuple[int, int]]) -> int:
    """Standing of the first: alone and often, alone and once, ahead with half of all, just ahead."""
    first = followers[0][1]
    if len(followers) == 1:
        return 0 if first > 1 else 1
    return 2 if 2 * first >= sum([count for _, count in followers]) else 3


def _noise(ask: Ask, tokens_NK: Ints) -> Floats:
    length, noise = len(ask.sequence.tokens), ask.sequence.noise
    depth_N = np.array([-1 if node == ROOT else ask.tree.depth_N[node] for node in ask.nodes])
    ids_NK = torch.from_numpy(tokens_NK).to(noise.device)
    found_NK = torch.empty(tokens_NK.shape, device=noise.device)
    for depth in np.unique(depth_N).tolist():
        rows = torch.from_numpy(np.flatnonzero(depth_N == depth)).to(noise.device)
        found_NK[rows] = noise.row(length + 1 + depth)[ids_NK[rows]]
    return np.asarray(found_NK.double().cpu().numpy())


def with_noise(chances_NK: Floats, noise_NK: Floats) -> Floats:
    """log P(child is chosen | the noise): the race among the named children, and against all the others.

    With P(token) = p the choice is argmax(log p + G). The best of the others is distributed like log(rest) + Gumbel,
    so a named winner of score v is the choice with probability exp(-rest * exp(-v)).
    """
    with np.errstate(divide="ignore"):
        scores_NK = np.log(chances_NK) + noise_NK
        best_N1 = scores_NK.max(-1, keepdims=True)
        best_N1 = np.where(np.isfinite(best_N1), best_N1, 0.0)
        share_NK = np.exp((scores_NK - best_N1) / TAU)
        share_NK /= np.maximum(share_NK.sum(-1, keepdims=True), 1e-300)
        rest_N1 = 1.0 - chances_NK.sum(-1, keepdims=True)
        return np.asarray(np.log(share_NK) - rest_N1 * np.exp(-best_N1))
