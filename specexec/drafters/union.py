"""Several drafters at once: the union of their children (SpecInfer's merged trees, Miao et al. 2024), in one score.

Every node goes to every member that it can pay: where seconds count, an expensive member is left out of the unlikely
part of the tree, which the others then have to themselves (Cascade Speculative Drafting, Chen et al. 2024).
M members or M = N + 1 rows of choices   N nodes   K children
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import compress
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from specexec.drafters.cost import CostModel, Line
from specexec.drafters.guarded import Guarded
from specexec.drafters.mixture import Cell, MemberGuesses, Trust, merge
from specexec.drafters.protocol import Ask, Drafter, Guesses
from specexec.learned import Arrays, packed, unpack
from specexec.text.sequence import Sequence
from specexec.tree.tree import ROOT, Floats, Ints, TokenTree

MOST_NODES = 256  # of one tree teach: those the text was most likely to meet


@dataclass(frozen=True)
class _Said:
    """What all members said about some nodes, and how they were weighed."""

    tokens_NK: Ints
    chances_MNK: Floats
    cells: list[Cell]


class _Talk:
    """About one growing tree: what was said of each node, and which member was asked about it."""

    def __init__(self, members: int) -> None:
        self.said: dict[int, tuple[_Said, int]] = {}  # by node: a batch, and the node's row there
        self._asked_MN = np.zeros((members, 1), bool)  # ROOT, and the nodes from 0 on

    def asked(self, member: int, nodes_N: Ints) -> NDArray[np.bool_]:
        """Which of these nodes it was asked about."""
        return np.asarray(self._asked_MN[member, nodes_N + 1])

    def ask(self, nodes_N: Ints, share_MN: NDArray[np.bool_]) -> None:
        """Every member is asked about its share of these nodes."""
        missing = int(nodes_N.max()) + 2 - self._asked_MN.shape[1]
        if missing > 0:
            self._asked_MN = np.pad(self._asked_MN, ((0, 0), (0, missing)))
        self._asked_MN[:, nodes_N + 1] |= share_MN

    def moved_on(self, end: int, kept_N: Ints) -> _Talk:
        """The same below `end`, the node of the text's new last token; `kept_N` are called 0, 1, 2, … from now on."""
        talk, nodes = _Talk(len(self._asked_MN)), [end, *kept_N.tolist()]
        talk.said = {new - 1: self.said[old] for new, old in enumerate(nodes) if old in self.said}
        missing = max(nodes) + 2 - self._asked_MN.shape[1]
        talk._asked_MN = np.pad(self._asked_MN, ((0, 0), (0, max(missing, 0))))[:, np.array(nodes) + 1]
        return talk


class Union:
    """Answers with the children of all members. Reads texts as long as the longest context of its members.

    With `cost`, a member is asked about a node only if that is likely to win back the seconds it takes.
    """

    def __init__(self, members: Items[Drafter], cost: CostModel | None = None) -> None:
        self.members = list(members)
        self.guarded = [Guarded(member) for member in members]  # one that fails leaves the tree to the others
        self.name = "+".join(member.name for member in members)
        self.context = max(member.context for member in members)
        self.prices = [Line() for _ in members]  # seconds that answering about so many nodes takes
        self._cost = cost
        self.trust = Trust()
        self.resting: frozenset[int] = frozenset()  # members that are not asked for the time being
        self.drafted_s = np.zeros(len(self.members))  # seconds each member took to answer; the caller resets it
        self._talks: WeakKeyDictionary[Sequence, _Talk] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """What those members that have answers at hand all have."""
        known = [found for index, one in enumerate(self.guarded) if (found := one.at_hand(self._open_to(index, asks)))]
        sets = [{(ask.sequence, node) for ask in found for node in ask.nodes} for found in known]
        common = set.intersection(*sets) if sets else set()
        kept = [replace(ask, nodes=[node for node in ask.nodes if (ask.sequence, node) in common]) for ask in asks]
        return [ask for ask in kept if ask.nodes]

    def _open_to(self, index: int, asks: list[Ask]) -> list[Ask]:
        """The nodes below the texts that a member can be asked about."""
        growing = [(ask, self._known(index, ask)) for ask in asks if ROOT not in ask.nodes]
        return [replace(ask, nodes=[*compress(ask.nodes, known_N)]) for ask, known_N in growing if known_N.any()]

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """Ask every member about its share of the nodes; merge equal tokens, keep the `width` best children."""
        for ask in asks:
            if ROOT in ask.nodes:
                self._talks[ask.sequence] = _Talk(len(self.members))
        shares = [self._shares(ask) for ask in asks]
        guesses = [
            self._guesses_of(at, asks, [np.flatnonzero(share_MN[at]).tolist() for share_MN in shares], width)
            for at in range(len(self.members))
        ]
        return [self._merged(ask, list(members), width) for ask, *members in zip(asks, *guesses, strict=True)]

    def _guesses_of(self, index: int, asks: list[Ask], shares: list[list[int]], width: int) -> list[MemberGuesses]:
        """One member's answers about its rows of every ask, all in one call."""
        own = [
            replace(ask, nodes=[ask.nodes[row] for row in share])
            for ask, share in zip(asks, shares, strict=True)
            if share
        ]
        began = time.perf_counter()
        answers = iter(self.guarded[index].guess(own, width) if own else [])
        took_s = time.perf_counter() - began
        self.drafted_s[index] += took_s
        if own and ROOT not in own[0].nodes:  # those read the text first
            self.prices[index].learn(sum(len(ask.nodes) for ask in own), took_s)
        guesses: list[MemberGuesses] = []
        for ask, share in zip(asks, shares, strict=True):
            if share:
                answer = next(answers)
                guesses.append(MemberGuesses.of(answer.tokens_NK, answer.log_probs_NK).spread(share, len(ask.nodes)))
            else:
                guesses.append(MemberGuesses.nothing(len(ask.nodes)))
        return guesses

    def _shares(self, ask: Ask) -> NDArray[np.bool_]:
        """Which member to ask about which nodes, [M, N]: those worth its seconds, or worth no other's."""
        cost = self._cost if ask.waited else None
        floor_M = np.array([-np.inf if cost is None else cost.floor(price) for price in self.prices])
        known_MN = np.stack([self._known(index, ask) for index in range(len(self.members))])
        paid_MN = known_MN & (ask.tree.reach_of(ask.nodes) >= floor_M[:, None])
        share_MN = known_MN & (paid_MN | ~paid_MN.any(0))
        self._talks[ask.sequence].ask(np.array(ask.nodes), share_MN)
        return share_MN

    def _known(self, index: int, ask: Ask) -> NDArray[np.bool_]:
        """The nodes that a member can be asked about, [N]: not too deep for it, and below nodes that it knows."""
        if index in self.resting:
            return np.zeros(len(ask.nodes), bool)
        room = self.members[index].context - len(ask.sequence.tokens)
        if ask.nodes == [ROOT]:
            return np.array([room > 0])
        asked_N = self._talks[ask.sequence].asked(index, ask.tree.parents_N[ask.nodes])
        return asked_N & (ask.tree.depth_N[ask.nodes] + 1 < room)

    def _merged(self, ask: Ask, guesses: list[MemberGuesses], width: int) -> Guesses:
        children = merge(guesses)
        sampled = int(bool(ask.sequence.sampling.temperature))
        cells: list[Cell] = [(sampled, *bins) for bins in np.stack([one.bins_N for one in guesses], axis=1).tolist()]
        weight_of = {cell: self.trust.weights(cell) for cell in set(cells)}
        weights_NM = np.stack([weight_of[cell] for cell in cells])
        chances_NK = np.einsum("mnk,nm->nk", children.chances_MNK, weights_NM)
        said = _Said(children.tokens_NK, children.chances_MNK, cells)
        self._talks[ask.sequence].said.update((node, (said, row)) for row, node in enumerate(ask.nodes))
        best_NK = np.argsort(-chances_NK, axis=1, kind="stable")[:, :width]
        with np.errstate(divide="ignore"):
            log_probs_NK = np.log(np.take_along_axis(chances_NK, best_NK, axis=1))
        origins_NK = ((children.chances_MNK > 0) << np.arange(len(guesses))[:, None, None]).sum(0)
        tokens_NK, origins_NK = (np.take_along_axis(of, best_NK, axis=1) for of in (children.tokens_NK, origins_NK))
        return Guesses(np.maximum(tokens_NK, 0), log_probs_NK, origins_NK)

    def named(self, sequence: Sequence, tree: TokenTree, written: Items[int]) -> Ints:
        """How many of the tokens written since, from the first on, each member itself had guessed in `tree`, [M]."""
        talk, node = self._talks.get(sequence), ROOT
        count_M, alive_M = np.zeros(len(self.members), np.int64), np.ones(len(self.members), bool)
        for token in written:
            child = tree.child(node, token)
            answer = talk.said.get(ROOT if node == ROOT else int(tree.ids_N[node])) if talk else None
            if child is None or answer is None:
                break
            said, row = answer
            alive_M &= (said.chances_MNK[:, row] * (said.tokens_NK[row] == token)).any(1)
            count_M += alive_M
            node = child
        return count_M

    def pack(self) -> dict[str, Floats]:
        """Whom to believe, and what each member knows about itself."""
        own = [packed(member, f"{at}") for at, member in enumerate(self.members)]
        return packed(self.trust, "trust") | {key: array for arrays in own for key, array in arrays.items()}

    def unpack(self, arrays: Arrays) -> None:
        """Start as wise as an earlier union of the same members ended. Raises ValueError for what is not theirs."""
        trust = Trust()
        unpack(trust, "trust", arrays)
        if any(len(count_M) != len(self.members) for count_M in trust.counts.values()):
            raise ValueError("these are weights of other members")
        for at, member in enumerate(self.members):
            unpack(member, f"{at}", arrays)
        self.trust = trust

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Learn whom to believe, then let every member learn and move on with the text."""
        talk = self._talks.setdefault(sequence, _Talk(len(self.members)))
        self._learn(talk, tree, choices_M)
        end = ROOT if kept is None else int(sequence.growth.tree.parents_N[kept[0]])
        for index, member in enumerate(self.guarded):
            # Who does not know the node of the new last token knows nothing below it either.
            member.observe(sequence, tree, choices_M, kept if talk.asked(index, np.array([end]))[0] else None)
        if kept is not None:
            self._talks[sequence] = talk.moved_on(end, kept)

    def _learn(self, talk: _Talk, tree: TokenTree, choices_M: list[int]) -> None:
        likely = np.argsort(-tree.reach_N, kind="stable")[:MOST_NODES].tolist()
        for node in [ROOT, *likely]:
            answer = talk.said.get(ROOT if node == ROOT else int(tree.ids_N[node]))
            if answer is None:
                continue
            said, row = answer
            likelihood_M = (said.chances_MNK[:, row] * (said.tokens_NK[row] == choices_M[1 + node])).sum(1)
            if likelihood_M.any():  # a choice that no member named teaches nothing about them
                chance = 1.0 if node == ROOT else float(np.exp(min(tree.reach_N[node], 0.0)))
                self.trust.learn(said.cells[row], likelihood_M, chance)
