"""Several drafters at once: the union of their children (SpecInfer's merged trees, Miao et al. 2024), one currency.

Every node goes to every member that it can pay: where seconds count, an expensive member is left out of the unlikely
part of the tree, which the others then have to themselves (Cascade Speculative Drafting, Chen et al. 2024).
M members or M = N + 1 rows of choices   N nodes   K children
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from specexec.cost import CostModel, Line
from specexec.drafters import Ask, Drafter, Guesses
from specexec.learned import Arrays, packed, unpack
from specexec.mixture import Cell, Told, Trust, merge
from specexec.sequence import Sequence
from specexec.tree import ROOT, Floats, Ints, TokenTree

MOST_NODES = 256  # of one tree teach: those the text was most likely to meet


@dataclass(frozen=True)
class _Said:
    """What all members said about one node, and how they were weighed."""

    tokens_K: Ints
    chances_MK: Floats
    cell: Cell


@dataclass
class _Talk:
    """About one growing tree: what was said, and for each member the nodes it was asked about."""

    said: dict[int, _Said]
    asked: list[set[int]]

    def moved_on(self, end: int, kept: Items[int]) -> _Talk:
        """The same below `end`, the node of the text's new last token; `kept` are called 0, 1, 2, … from now on."""
        name = {old: new for new, old in enumerate(kept)} | {end: ROOT}
        said = {name[old]: one for old, one in self.said.items() if old in name}
        return _Talk(said, [{name[old] for old in asked if old in name} for asked in self.asked])


class Union:
    """Answers with the children of all members. Reads texts as long as its most patient member does.

    With `cost`, a member is asked about a node only if that is likely to win back the seconds it takes.
    """

    def __init__(self, members: Items[Drafter], cost: CostModel | None = None) -> None:
        self.members = list(members)
        self.name = "+".join(member.name for member in members)
        self.context = max(member.context for member in members)
        self.prices = [Line() for _ in members]  # seconds that answering about so many nodes takes
        self._cost = cost
        self.trust = Trust()
        self.resting: frozenset[int] = frozenset()  # members that are not asked for the time being
        self.drafted_s = np.zeros(len(self.members))  # seconds each member took to answer, for whoever resets it
        self._talks: WeakKeyDictionary[Sequence, _Talk] = WeakKeyDictionary()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """What those members that have answers at hand all have."""
        known = [found for index, one in enumerate(self.members) if (found := one.at_hand(self._open_to(index, asks)))]
        sets = [{(ask.sequence, node) for ask in found for node in ask.nodes} for found in known]
        common = set.intersection(*sets) if sets else set()
        kept = [replace(ask, nodes=[node for node in ask.nodes if (ask.sequence, node) in common]) for ask in asks]
        return [ask for ask in kept if ask.nodes]

    def _open_to(self, index: int, asks: list[Ask]) -> list[Ask]:
        """The nodes below the texts that a member can be asked about."""
        growing = [(ask, self._known(index, ask)) for ask in asks if ROOT not in ask.nodes]
        return [replace(ask, nodes=[ask.nodes[row] for row in rows]) for ask, rows in growing if rows]

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """Ask every member about its share of the nodes; merge equal tokens, keep the `width` best children."""
        for ask in asks:
            if ROOT in ask.nodes:
                self._talks[ask.sequence] = _Talk({}, [set() for _ in self.members])
        shares = [self._shares(ask) for ask in asks]
        told = [self._told(at, asks, [share[at] for share in shares], width) for at in range(len(self.members))]
        return [self._merged(ask, list(members), width) for ask, *members in zip(asks, *told, strict=True)]

    def _told(self, index: int, asks: list[Ask], shares: list[list[int]], width: int) -> list[Told]:
        """One member's answers about its rows of every ask, all in one call."""
        own = [
            replace(ask, nodes=[ask.nodes[row] for row in share])
            for ask, share in zip(asks, shares, strict=True)
            if share
        ]
        began = time.perf_counter()
        answers = iter(self.members[index].guess(own, width) if own else [])
        took_s = time.perf_counter() - began
        self.drafted_s[index] += took_s
        if own and ROOT not in own[0].nodes:  # those read the text first
            self.prices[index].learn(sum(len(ask.nodes) for ask in own), took_s)
        told: list[Told] = []
        for ask, share in zip(asks, shares, strict=True):
            if share:
                answer = next(answers)
                told.append(Told.of(answer.tokens_NK, answer.log_probs_NK).spread(share, len(ask.nodes)))
            else:
                told.append(Told.nothing(len(ask.nodes)))
        return told

    def _shares(self, ask: Ask) -> list[list[int]]:
        """For each member the rows of the nodes it is asked about: worth its seconds, or known to nobody cheaper."""
        cost = self._cost if ask.waited else None
        floors = [-np.inf if cost is None else cost.floor(price) for price in self.prices]
        reach = [0.0 if node == ROOT else float(ask.tree.reach_N[node]) for node in ask.nodes]
        knows = [self._known(index, ask) for index in range(len(self.members))]
        paid = [{row for row in rows if reach[row] >= floor} for rows, floor in zip(knows, floors, strict=True)]
        left = set(range(len(ask.nodes))).difference(*paid)
        shares = [[row for row in rows if row in own or row in left] for rows, own in zip(knows, paid, strict=True)]
        for share, asked in zip(shares, self._talks[ask.sequence].asked, strict=True):
            asked.update(ask.nodes[row] for row in share)
        return shares

    def _known(self, index: int, ask: Ask) -> list[int]:
        """Rows of the nodes that a member can be asked about: not too deep for it, and below nodes that it knows."""
        if index in self.resting:
            return []
        room = self.members[index].context - len(ask.sequence.tokens)
        asked, tree = self._talks[ask.sequence].asked[index], ask.tree
        return [
            row
            for row, node in enumerate(ask.nodes)
            if (room > 0 if node == ROOT else int(tree.parents_N[node]) in asked and tree.depth_N[node] + 1 < room)
        ]

    def _merged(self, ask: Ask, told: list[Told], width: int) -> Guesses:
        children = merge(told)
        sampled = int(bool(ask.sequence.sampling.temperature))
        cells: list[Cell] = [(sampled, *bins) for bins in np.stack([one.bins_N for one in told], axis=1).tolist()]
        weights_NM = np.stack([self.trust.weights(cell) for cell in cells])
        chances_NK = np.einsum("mnk,nm->nk", children.chances_MNK, weights_NM)
        said = self._talks[ask.sequence].said
        for row, node in enumerate(ask.nodes):
            said[node] = _Said(children.tokens_NK[row], children.chances_MNK[:, row], cells[row])
        best_NK = np.argsort(-chances_NK, axis=1, kind="stable")[:, :width]
        with np.errstate(divide="ignore"):
            log_probs_NK = np.log(np.take_along_axis(chances_NK, best_NK, axis=1))
        origins_NK = ((children.chances_MNK > 0) << np.arange(len(told))[:, None, None]).sum(0)
        tokens_NK, origins_NK = (np.take_along_axis(of, best_NK, axis=1) for of in (children.tokens_NK, origins_NK))
        return Guesses(np.maximum(tokens_NK, 0), log_probs_NK, origins_NK)

    def named(self, sequence: Sequence, tree: TokenTree, written: Items[int]) -> Ints:
        """How many of the tokens written since, from the first on, each member itself had guessed in `tree`, [M]."""
        talk, node = self._talks.get(sequence), ROOT
        count_M, alive_M = np.zeros(len(self.members), np.int64), np.ones(len(self.members), bool)
        for token in written:
            child = tree.child(node, token)
            said = talk.said.get(ROOT if node == ROOT else int(tree.ids_N[node])) if talk else None
            if child is None or said is None:
                break
            alive_M &= (said.chances_MK * (said.tokens_K == token)).any(1)
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
        talk = self._talks.setdefault(sequence, _Talk({}, [set() for _ in self.members]))
        self._learn(talk, tree, choices_M)
        end = ROOT if kept is None else int(sequence.growth.tree.parents_N[kept[0]])
        for member, asked in zip(self.members, talk.asked, strict=True):
            # Who does not know the node of the new last token knows nothing below it either.
            member.observe(sequence, tree, choices_M, kept if end in asked else None)
        if kept is not None:
            self._talks[sequence] = talk.moved_on(end, kept.tolist())

    def _learn(self, talk: _Talk, tree: TokenTree, choices_M: list[int]) -> None:
        likely = np.argsort(-tree.reach_N, kind="stable")[:MOST_NODES].tolist()
        for node in [ROOT, *likely]:
            said = talk.said.get(ROOT if node == ROOT else int(tree.ids_N[node]))
            if said is None:
                continue
            likelihood_M = (said.chances_MK * (said.tokens_K == choices_M[1 + node])).sum(1)
            if likelihood_M.any():  # a choice nobody named teaches nothing about whom to believe
                chance = 1.0 if node == ROOT else float(np.exp(min(tree.reach_N[node], 0.0)))
                self.trust.learn(said.cell, likelihood_M, chance)
