"""A drafter model with another tokenizer: its guesses are translated as text (OmniDraft, Ramakrishnan et al. 2025).

Each guess of theirs is a piece of text, as bytes; our tokenizer cuts it. A piece that makes several of our tokens
promises the later ones; one that only begins a token of ours becomes tokens that began so before (the n-gram cache).
Verification never asks how a guess was found, so the text stays exact whatever goes wrong here.
N nodes   C candidates   V vocabulary
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from specexec.drafters.calibration import Calibrated, log_softmax
from specexec.drafters.protocol import Ask, Guesses
from specexec.model.cache import KVCache, common_prefix
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from specexec.sizes import PIECE
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

CANDIDATES = 48
BACK = 3  # tokens of theirs at the end of the text that what follows may cut otherwise
LIKELY_BEGINNINGS = 4  # tokens of ours that one of theirs may begin
Path = tuple[int, ...]


class TokenWording(Protocol):
    """What this needs of a tokenizer."""

    begin: tuple[int, ...]
    end: int | None
    lead: bytes

    def cut(self, text: bytes) -> list[int]: ...

    def spelled(self, tokens: Items[int]) -> bytes: ...


@dataclass
class _Promise:
    """What may follow below a node because a longer piece of theirs led there, as shares of the node's own chance."""

    rests: dict[Path, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return min(sum(self.rests.values()), 1.0)


@dataclass
class _Reading:
    """One text in their tokens, and the tree below it."""

    cache: KVCache = field(default_factory=KVCache)
    length: int = 0  # tokens of ours that were read
    tail: bytes = b""  # text after what the cache has committed
    room: int = 0  # rows that may follow that in the model's context
    paths: dict[int, Path] = field(default_factory=dict)  # by node: our tokens after the tail
    rows: dict[Path, int] = field(default_factory=dict)  # by their tokens after the cache's text
    best: dict[Path, tuple[list[int], list[float]]] = field(default_factory=dict)
    promises: dict[Path, _Promise] = field(default_factory=dict)
    said: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)


class TranslatedDrafter(Calibrated):
    """Guesses by a causal LM whose tokens are not the target's."""

    def __init__(
        self, lm: TreeLM, ours: TokenWording, theirs: TokenWording, name: str, window: int | None = None
    ) -> None:
        super().__init__()
        self.name, self.context, self._window = name, lm.context, window
        self.lm, self._ours, self._theirs = lm, ours, theirs
        self._pieces: dict[int, Path] = {}
        if ours.end is not None and theirs.end is not None:
            self._pieces[theirs.end] = (ours.end,)
        self._begun: dict[int, Counter[int]] = defaultdict(Counter)  # by their token: tokens of ours that began with it
        self._readings: WeakKeyDictionary[Sequence, _Reading] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """None: it reads nothing along."""
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """One pass of the model for all asked nodes."""
        wanted: list[tuple[Ask, _Reading, list[Path]]] = []
        parts: list[Rows] = []
        fresh: list[tuple[_Reading, list[Path]]] = []
        for ask in asks:
            reading = self._readings.setdefault(ask.sequence, _Reading())
            if ROOT in ask.nodes:
                self._read(reading, ask.sequence)
            theirs = [self._path(reading, ask, node) for node in ask.nodes]
            wanted.append((ask, reading, theirs))
            rows, new = self._rows(reading, theirs)
            if new:
                parts.append(rows)
                fresh.append((reading, new))
        for (reading, new), hidden_RH in zip(fresh, self.lm.forward(parts) if parts else [], strict=True):
            best = self.lm.head(hidden_RH).log_softmax(-1).topk(min(CANDIDATES, self.lm.vocabulary))
            for path, ids, chances in zip(new, best.indices.tolist(), best.values.exp().tolist(), strict=True):
                reading.best[path] = (ids, chances)
        return [self._answer(ask, reading, theirs, width) for ask, reading, theirs in wanted]

    def _read(self, reading: _Reading, sequence: Sequence) -> None:
        """Bring their cache up to the end of the text, but for the tokens that may still change."""
        tokens = self._in_theirs(sequence.words())
        settled = tokens[: max(len(tokens) - BACK, len(self._theirs.begin))]
        reading.tail = self._theirs.spelled(tokens[len(settled) :])
        cache = reading.cache
        cache.window = self._window
        cache.rewind(common_prefix(cache.tokens, settled))
        reading.room = self.context - 1 - len(settled)
        at_once = len(settled) if self._window is None else PIECE
        while (pending := settled[len(cache) :][:at_once]) and reading.room > 0:
            self.lm.forward([Rows.text(cache, pending)])
            cache.commit(range(len(pending)))
        reading.length = len(sequence.tokens)
        reading.paths, reading.rows, reading.best = {ROOT: ()}, {}, {}
        reading.promises, reading.said = {}, {}

    def _in_theirs(self, tokens: Items[int]) -> list[int]:
        """A text of ours as they would write it: with their own beginning, and their own end where it has one."""
        own, found = self._ours.begin, list(self._theirs.begin)
        parts: list[list[int]] = [[]]
        for token in tokens[len(own) if tuple(tokens[: len(own)]) == own else 0 :]:
            if token == self._ours.end and self._theirs.end is not None:
                parts.append([])
            else:
                parts[-1].append(token)
        for number, part in enumerate(parts):
            text = self._ours.spelled(part)
            if not number:
                text = self._theirs.lead + text.removeprefix(self._ours.lead)
            found += [self._theirs.end] if number and self._theirs.end is not None else []
            found += self._theirs.cut(text)
        return found

    def _path(self, reading: _Reading, ask: Ask, node: int) -> Path:
        """The node's text after the settled one, in their tokens."""
        if node != ROOT:
            parent, token = int(ask.tree.parents_N[node]), int(ask.tree.tokens_N[node])
            reading.paths[node] = (*reading.paths[parent], token)
        return tuple(self._theirs.cut(reading.tail + self._ours.spelled(reading.paths[node])))

    def _rows(self, reading: _Reading, paths: Items[Path]) -> tuple[Rows, list[Path]]:
        """The rows that the model has not seen yet, as far as there is room: nodes share what they have in common."""
        new: list[Path] = []
        parents: list[int] = []
        first = len(reading.cache.parents)
        for path in paths:
            if first + len(new) + len(path) > reading.room:
                continue
            for end in range(1, len(path) + 1):
                if path[:end] not in reading.rows:
                    parents.append(reading.rows[path[: end - 1]] if end > 1 else -1)
                    reading.rows[path[:end]] = first + len(new)
                    new.append(path[:end])
        return Rows(reading.cache, [path[-1] for path in new], parents), new

    def _answer(self, ask: Ask, reading: _Reading, theirs: list[Path], width: int) -> Guesses:
        sequence, length = ask.sequence, len(ask.sequence.tokens)
        tokens_NC = np.zeros((len(ask.nodes), CANDIDATES), np.int64)
        scores_NC = np.full((len(ask.nodes), CANDIDATES), -np.inf)
        warmth = sequence.sampling.temperature or 0.0
        for row, (node, path) in enumerate(zip(ask.nodes, theirs, strict=True)):
            chances = self._chances(reading, reading.paths[node], path)
            if not chances:
                continue
            tokens = np.array(sorted(chances, key=lambda token: -chances[token])[:CANDIDATES])
            scores = np.log(np.maximum([chances[token] for token in tokens.tolist()], 1e-12))
            if warmth:
                position = length if node == ROOT else length + 1 + int(ask.tree.depth_N[node])
                noise_V = sequence.noise.on(self.lm.device).row(position)
                scores = scores + warmth * noise_V[torch.from_numpy(tokens).to(noise_V.device)].double().cpu().numpy()
            order = np.argsort(-scores, kind="stable")
            tokens_NC[row, : len(order)], scores_NC[row, : len(order)] = tokens[order], scores[order]
            reading.said[node] = (tokens_NC[row], scores_NC[row])
        some_N = np.isfinite(scores_NC[:, 0])
        log_probs_NC = np.full(scores_NC.shape, -np.inf)
        calibration = self.calibration(sequence.sampling)
        log_probs_NC[some_N] = log_softmax(scores_NC[some_N] / calibration.tau) + np.log1p(-calibration.miss)
        return Guesses(tokens_NC[:, :width], log_probs_NC[:, :width])

    def _chances(self, reading: _Reading, ours: Path, theirs: Path) -> dict[int, float]:
        """P(our next token) after a node: from whole pieces of theirs, and from those that have begun above it."""
        chances: dict[int, float] = defaultdict(float)
        below: dict[int, dict[Path, float]] = defaultdict(lambda: defaultdict(float))
        promised = reading.promises.get(ours, _Promise())
        for rest, share in promised.rests.items():
            chances[rest[0]] += share
            below[rest[0]][rest[1:]] += share
        for their, chance in zip(*reading.best.get(theirs, ([], [])), strict=True):
            if not (piece := self._piece(their)):
                continue
            chance *= 1.0 - promised.total
            begun = self._begun.get(their, Counter())
            often = sum(begun.values())
            for token, count in begun.most_common(LIKELY_BEGINNINGS):
                chances[token] += chance * count / (often + 1)
            chance /= often + 1
            chances[piece[0]] += chance
            below[piece[0]][piece[1:]] += chance
        for token, rests in below.items():
            # A chance may be too small for a number: it promises nothing, and nothing is divided by it.
            if longer := {rest: mass / chances[token] for rest, mass in rests.items() if rest and mass > 0}:
                reading.promises[(*ours, token)] = _Promise(longer)
        return chances

    def _piece(self, their: int) -> Path:
        """One token of theirs in ours; empty for an id that is no text."""
        if their not in self._pieces:
            self._pieces[their] = tuple(self._ours.cut(self._theirs.spelled([their])))
        return self._pieces[their]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Learn from the choices and from how the new text is cut; move on with the nodes below it."""
        reading = self._readings.get(sequence)
        if reading is None:
            return
        self._learn(reading, sequence.sampling, tree, choices_M)
        for token in sequence.tokens[reading.length :]:
            cut = self._theirs.cut(self._ours.spelled([token]))
            if len(cut) > 1:
                self._begun[cut[0]][token] += 1
        reading.length = len(sequence.tokens)
        if kept is not None:
            end = int(sequence.growth.tree.parents_N[kept[0]])
            name = {old: new for new, old in enumerate(kept.tolist())} | {end: ROOT}
            reading.paths = {name[old]: path for old, path in reading.paths.items() if old in name}
            reading.said = {name[old]: said for old, said in reading.said.items() if old in name}

    def _learn(self, reading: _Reading, sampling: SamplingParams, tree: TokenTree, choices_M: list[int]) -> None:
        nodes = [
            (ROOT, choices_M[0], 0.0),
            *zip(tree.ids_N.tolist(), choices_M[1:], tree.reach_N.tolist(), strict=True),
        ]
        judged = [(*reading.said[node], choice, reach) for node, choice, reach in nodes if node in reading.said]
        if not judged:
            return
        tokens_NC, scores_NC = np.stack([one[0] for one in judged]), np.stack([one[1] for one in judged])
        match_NC = (tokens_NC == np.array([one[2] for one in judged])[:, None]) & np.isfinite(scores_NC)
        hit_N = np.where(match_NC.any(1), match_NC.argmax(1), -1)
        self.calibration(sampling).learn(scores_NC, hit_N, np.exp([min(one[3], 0.0) for one in judged]))
