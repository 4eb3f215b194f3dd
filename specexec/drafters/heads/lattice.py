"""A lattice guesses: for each of the next positions one distribution, whatever is guessed in between (DDTree, 2026).

One pass for a text and its sweep; then every node of the tree is answered by its position, so the tree is the
best-first one of the products of these distributions. The noise of later positions is known as well. Farther positions
are worse guesses: each learns a tau of its own. Some heads have a small part that knows the token before
(following.py): what it adds to a distribution is computed for each node.
N nodes   C candidates   P positions   B rows of a block   H hidden size   S tokens that are named
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from specexec.drafters.calibration import Calibrated, log_softmax
from specexec.drafters.heads.following import Following, Kept, Path
from specexec.drafters.protocol import Ask, Guesses, nothing
from specexec.drafters.ranking import Named, Ranking
from specexec.drafters.read_rows import GONE, AskedBatch, evidence
from specexec.sampling.processors import History
from specexec.sampling.scores import constrained
from specexec.sizes import BEAMS, CANDIDATES
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

FARTHEST = 15  # positions from here on share a calibration


class Filled(NamedTuple):
    """Logits of the tokens at the next positions, made of the last P of these hidden states."""

    logits_PS: Tensor
    hidden_BH: Tensor


class Filler(Protocol):
    """What makes a lattice: one pass behind a text."""

    @property
    def context(self) -> int: ...

    def fill(self, sequence: Sequence) -> Filled | None:
        """The positions behind a text; None where it cannot tell."""
        ...


@dataclass
class _Lattice:
    """What was filled behind the first `first` tokens of a text, and what was said by it, by position."""

    first: int
    filled: Filled
    best: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)
    asked: list[tuple[int, AskedBatch]] = field(default_factory=list)
    paths: Kept = field(default_factory=dict)


class LatticeDrafter(Calibrated):
    """Guesses by what fills the positions behind a text; `named` says what its logits stand for."""

    def __init__(
        self,
        filler: Filler,
        named: Named,
        ranking: Ranking | None = None,
        name: str = "dflash",
        following: Following | None = None,
    ) -> None:
        super().__init__()
        self.name, self.context = name, filler.context
        self.ranking = ranking or Ranking()
        self._filler, self._named, self._following = filler, named, following
        self._lattices: WeakKeyDictionary[Sequence, _Lattice] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """Every node below a text that was filled."""
        return [ask for ask in asks if ROOT not in ask.nodes and ask.sequence in self._lattices]

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """One pass for each text that is asked about anew; nothing beyond the block's end."""
        for ask in asks:
            if ROOT in ask.nodes:
                self._lattices.pop(ask.sequence, None)
                if (filled := self._filler.fill(ask.sequence)) is not None:
                    filled = filled._replace(logits_PS=self._named.cut(filled.logits_PS))
                    self._lattices[ask.sequence] = _Lattice(len(ask.sequence.tokens), filled)
        return [self._answer(ask, width) if ask.sequence in self._lattices else nothing(ask) for ask in asks]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Learn how good each position was. The lattice stays as long as guesses below it do."""
        lattice = self._lattices.get(sequence)
        if lattice is None:
            return
        for depth in {depth for depth, _ in lattice.asked}:
            seen = evidence(tree, choices_M, [batch for own, batch in lattice.asked if own == depth])
            if seen is not None:
                self.calibration(sequence.sampling, depth).learn(*seen)
        if kept is None:
            del self._lattices[sequence]
            return
        end = int(sequence.growth.tree.parents_N[kept[0]])
        most = max([int(kept.max()), *(int(batch.nodes_N.max()) for _, batch in lattice.asked)])
        names_N = np.full(most + 2, GONE)
        names_N[np.append(end, kept) + 1] = np.arange(ROOT, len(kept))
        lattice.asked = [(depth, batch.renamed(names_N)) for depth, batch in lattice.asked]
        lattice.asked = [(depth, batch) for depth, batch in lattice.asked if len(batch.nodes_N)]

    def _answer(self, ask: Ask, width: int) -> Guesses:
        lattice, length = self._lattices[ask.sequence], len(ask.sequence.tokens)
        below_N = np.array([-1 if node == ROOT else int(ask.tree.depth_N[node]) for node in ask.nodes])
        place_N = length + 1 + below_N - lattice.first  # of the children, in the lattice
        shape = len(ask.nodes), min(width, self._most(lattice))
        tokens_NK, log_probs_NK = np.zeros(shape, np.int64), np.full(shape, -np.inf)
        for place in sorted({*place_N.tolist()} & {*range(len(lattice.filled.logits_PS))}):
            calibration = self.calibration(ask.sequence.sampling, min(place, FARTHEST))
            tau, all_rows = self.ranking.tau or calibration.tau, np.flatnonzero(place_N == place)
            for rows in np.split(all_rows, range(BEAMS, len(all_rows), BEAMS)):  # logits are large
                own = replace(ask, nodes=[ask.nodes[row] for row in rows])
                tokens_NC, scores_NC = self._candidates(lattice, own, place)
                lattice.asked.append((min(place, FARTHEST), AskedBatch(np.array(own.nodes), tokens_NC, scores_NC)))
                sure_NC = log_softmax(scores_NC / tau) + np.log1p(-calibration.miss)
                tokens_NK[rows], log_probs_NK[rows] = tokens_NC[:, : shape[1]], sure_NC[:, : shape[1]]
        return Guesses(tokens_NK, log_probs_NK)

    def _most(self, lattice: _Lattice) -> int:
        """Children of a node that are looked at."""
        named = lattice.filled.logits_PS.shape[1]
        return min(CANDIDATES, named, named if self._following is None else self._following.most)

    def _candidates(self, lattice: _Lattice, ask: Ask, place: int) -> tuple[Ints, Floats]:
        """The best tokens at one position, [N, C], and their scores: the same for all nodes unless paths matter."""
        sequence, sampling = ask.sequence, ask.sequence.sampling
        if sampling.penalised or sequence.parse is not None or self._following is not None:
            return self._scored(lattice, ask, place)
        if place not in lattice.best:
            lattice.best[place] = self._scored(lattice, replace(ask, nodes=ask.nodes[:1]), place)
        tokens_NC, scores_NC = lattice.best[place]
        return tokens_NC.repeat(len(ask.nodes), 0), scores_NC.repeat(len(ask.nodes), 0)

    def _scored(self, lattice: _Lattice, ask: Ask, place: int) -> tuple[Ints, Floats]:
        sequence, sampling, count = ask.sequence, ask.sequence.sampling, len(ask.nodes)
        histories: list[History] = []
        if sampling.penalised:
            above = sequence.history_on(self._named.device)
            histories = [above.after(ask.tree.tokens_N[ask.tree.path(node)].tolist()) for node in ask.nodes]
        found = self._named.among(sequence, self._logits(lattice, ask, place))
        logits_NV = constrained(found.logits_NV, sampling, sequence.parse, ask.tree, ask.nodes)
        positions = [lattice.first + place] * count
        scores_NV = self.ranking.scores(logits_NV, sampling, found.noise, positions, histories)
        best = scores_NV.topk(self._most(lattice))
        return found.tokens(best.indices).cpu().numpy(), best.values.double().cpu().numpy()

    def _logits(self, lattice: _Lattice, ask: Ask, place: int) -> Tensor:
        """Of the children of nodes that are so far behind the text, [N, S]."""
        logits_PS, hidden_BH = lattice.filled
        if self._following is None:
            return logits_PS[place].expand(len(ask.nodes), -1).clone()
        paths, row = [self._path(lattice, ask, node) for node in ask.nodes], place + len(hidden_BH) - len(logits_PS)
        return self._following.logits(logits_PS[place], hidden_BH, row, paths, lattice.paths)

    def _path(self, lattice: _Lattice, ask: Ask, node: int) -> Path:
        """The last token that the lattice was filled behind, and all that lead from there to a node."""
        below: Items[int] = [] if node == ROOT else ask.tree.tokens_N[ask.tree.path(node)].tolist()
        return (*ask.sequence.tokens[lattice.first - 1 :], *below)
