"""A lattice guesses: for each of the next positions one distribution, whatever is guessed in between (DDTree, 2026).

One pass for a text and its sweep; then every node of the tree is answered by its position, so the tree is the
best-first one of the products of these distributions. The noise of later positions is known as well. Farther positions
are worse guesses: each learns a tau of its own.
N nodes   C candidates   P positions   H hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from specexec.drafters.calibration import Calibrated, log_softmax
from specexec.drafters.heads.dflash import DFlash, loaded
from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Ask, Drafter, Guesses, nothing
from specexec.drafters.ranking import Ranking
from specexec.drafters.read_rows import GONE, AskedBatch, evidence
from specexec.model.tree_lm import TreeLM
from specexec.sampling.processors import History
from specexec.sampling.scores import constrained
from specexec.sizes import CANDIDATES, PIECE
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

FARTHEST = 15  # positions from here on share a calibration


@dataclass
class _Lattice:
    """Logits of the tokens at the positions from `first` on, and what was said by them, by position."""

    first: int
    logits_PV: Tensor
    best: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)
    asked: list[tuple[int, AskedBatch]] = field(default_factory=list)


class LatticeDrafter(Calibrated):
    """Guesses by a head that fills a block behind the text; it names none of `never`.

    With a `window` it sees of a text the first tokens and at least so many last ones.
    """

    def __init__(
        self,
        head: DFlash,
        target: TreeLM,
        vocabulary: int,
        ranking: Ranking | None = None,
        name: str = "dflash",
        never: Iterable[int] = (),
        window: int | None = None,
    ) -> None:
        super().__init__()
        self._window = window
        self.name, self.context = name, head.context
        self.head, self.ranking = head, ranking or Ranking()
        self._target, self._vocabulary = target, min(vocabulary, target.vocabulary)
        self._never = torch.tensor(sorted(one for one in never if one < self._vocabulary), device=target.device)
        target.taps.want(self, head.fields.taps)
        self._lattices: WeakKeyDictionary[Sequence, _Lattice] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """Every node below a text that was filled."""
        return [ask for ask in asks if ROOT not in ask.nodes and ask.sequence in self._lattices]

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """One pass for each text that is asked about anew; nothing beyond the block's end."""
        for ask in asks:
            if ROOT in ask.nodes:
                self._lattices.pop(ask.sequence, None)
                self._fill(ask.sequence)
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

    def _fill(self, sequence: Sequence) -> None:
        """Read what the target has processed since, then one pass; nothing where the target has not read the text."""
        taken, end = sequence.cache(self._target).taken, len(sequence.tokens) - 1
        if taken is None or taken.end != end:
            return
        cache = sequence.cache(self.head)
        cache.forget_nodes()
        cache.window = self._window
        first = taken.first(self.head.fields.taps)
        if len(cache) < first:  # states in between are missing: begin anew where they begin
            cache.rewind(0)
            cache.tokens, cache.unread = sequence.tokens[:first], first
        for at in range(len(cache), end, PIECE):
            new = sequence.tokens[at : min(at + PIECE, end)]
            states = [taken.between(tap, at, at + len(new)) for tap in self.head.fields.taps]
            self.head.read(cache, new, torch.cat(states, -1))
        logits_PV = self._target.head(self.head.fill(cache, sequence.tokens[-1]))[:, : self._vocabulary]
        logits_PV = self.head.fields.shaped(logits_PV)
        logits_PV = logits_PV.index_fill_(1, self._never, float("-inf")) if len(self._never) else logits_PV
        self._lattices[sequence] = _Lattice(len(sequence.tokens), logits_PV)

    def _answer(self, ask: Ask, width: int) -> Guesses:
        lattice, length = self._lattices[ask.sequence], len(ask.sequence.tokens)
        below_N = np.array([-1 if node == ROOT else int(ask.tree.depth_N[node]) for node in ask.nodes])
        place_N = length + 1 + below_N - lattice.first  # of the children, in the lattice
        shape = len(ask.nodes), min(width, CANDIDATES, lattice.logits_PV.shape[1])
        tokens_NK, log_probs_NK = np.zeros(shape, np.int64), np.full(shape, -np.inf)
        for place in sorted({*place_N.tolist()} & {*range(len(lattice.logits_PV))}):
            rows = np.flatnonzero(place_N == place)
            own = replace(ask, nodes=[ask.nodes[row] for row in rows])
            tokens_NC, scores_NC = self._candidates(lattice, own, place)
            lattice.asked.append((min(place, FARTHEST), AskedBatch(np.array(own.nodes), tokens_NC, scores_NC)))
            calibration = self.calibration(ask.sequence.sampling, min(place, FARTHEST))
            tau = self.ranking.tau or calibration.tau
            sure_NC = log_softmax(scores_NC / tau) + np.log1p(-calibration.miss)
            tokens_NK[rows], log_probs_NK[rows] = tokens_NC[:, : shape[1]], sure_NC[:, : shape[1]]
        return Guesses(tokens_NK, log_probs_NK)

    def _candidates(self, lattice: _Lattice, ask: Ask, place: int) -> tuple[Ints, Floats]:
        """The best tokens at one position, [N, C], and their scores: the same for all nodes unless paths matter."""
        sequence, sampling = ask.sequence, ask.sequence.sampling
        same = not sampling.penalised and sequence.parse is None
        if same and place not in lattice.best:
            lattice.best[place] = self._scored(lattice, replace(ask, nodes=ask.nodes[:1]), place)
        tokens_NC, scores_NC = lattice.best[place] if same else self._scored(lattice, ask, place)
        times = len(ask.nodes) // len(tokens_NC)
        return tokens_NC.repeat(times, 0), scores_NC.repeat(times, 0)

    def _scored(self, lattice: _Lattice, ask: Ask, place: int) -> tuple[Ints, Floats]:
        sequence, sampling, count = ask.sequence, ask.sequence.sampling, len(ask.nodes)
        histories: list[History] = []
        if sampling.penalised:
            above = sequence.history
            histories = [above.after(ask.tree.tokens_N[ask.tree.path(node)].tolist()) for node in ask.nodes]
        logits_NV = lattice.logits_PV[place].expand(count, -1).clone()
        logits_NV = constrained(logits_NV, sampling, sequence.parse, ask.tree, ask.nodes)
        positions = [lattice.first + place] * count
        scores_NV = self.ranking.scores(logits_NV, sampling, sequence.noise, positions, histories)
        best = scores_NV.topk(min(CANDIDATES, scores_NV.shape[1]))
        return best.indices.cpu().numpy(), best.values.double().cpu().numpy()


def make(kit: DrafterKit) -> Drafter:
    """A head from a folder of its own, for this target."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    target, ids, found = kit.target, kit.names, kit.head
    head = loaded(found.settings, found.tensors(), TargetSizes.of(target), found.name)
    return LatticeDrafter(head, target, ids.rows, kit.ranking, found.name, ids.never, kit.window)
