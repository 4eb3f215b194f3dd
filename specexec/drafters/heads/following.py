"""Small parts of heads that know the token before: what they add to a distribution that does not.

DSpark (DeepSeek): logits + W2 m, where m is w1[token before]; or that gated by the place's hidden state; or what a
small recurrent cell makes of both along the path. DFlash-2 (z-lab): the best candidates of the logits anew, each by
logit + <P[token before] * (W h), S[candidate]>.
N paths   B rows of a block   S tokens that are named   H hidden size   R rank
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

import torch
from torch import Tensor, nn

from specexec.sizes import CANDIDATES

Path = tuple[int, ...]
"""The token that a block was filled behind, and those that lead from there to a node."""
Kept = dict[Path, Tensor]


class Following(Protocol):
    """What follows paths of one length."""

    @property
    def most(self) -> int:
        """Children of a node that can be told apart."""
        ...

    def logits(self, logits_S: Tensor, hidden_BH: Tensor, row: int, paths: Items[Path], kept: Kept) -> Tensor:
        """[N, S]; `logits_S` are those of the place that the paths lead to, whose hidden state is row `row`.

        S are the first of the tokens that it knows: a target may have rows for more than its tokenizer has entries.
        `kept` holds what was found out about shorter paths of the same block, and about these from now on.
        """
        ...


class Selector(nn.Module):
    """Of DFlash-2: compares the best candidates."""

    def __init__(self, vocabulary: int, hidden: int, rank: int, best: int) -> None:
        super().__init__()
        self.predecessor_codebook, self.successor_codebook = (
            nn.Parameter(torch.empty(vocabulary, rank)) for _ in range(2)
        )
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)
        self._best = best

    @property
    def most(self) -> int:
        return min(self._best, CANDIDATES)

    @torch.no_grad()
    def logits(self, logits_S: Tensor, hidden_BH: Tensor, row: int, paths: Items[Path], kept: Kept) -> Tensor:
        best = logits_S.topk(min(self._best, len(logits_S)))
        own_R = self.hidden_projection(hidden_BH[row].to(self.hidden_projection.weight))
        before_NR = self.predecessor_codebook[_last(paths, hidden_BH)] * own_R
        scores_NC = best.values + (before_NR @ self.successor_codebook[best.indices].T).to(logits_S)
        wide_NS = logits_S.new_full((len(paths), len(logits_S)), -torch.inf)
        return wide_NS.scatter_(1, best.indices.expand(len(paths), -1), scores_NC)


class Markov(nn.Module):
    """Of DSpark, in three kinds: vanilla, gated, and rnn, whose state runs along the path."""

    most = CANDIDATES

    def __init__(self, kind: str, vocabulary: int, named: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, named, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)
        self._kind = kind

    @torch.no_grad()
    def logits(self, logits_S: Tensor, hidden_BH: Tensor, row: int, paths: Items[Path], kept: Kept) -> Tensor:
        hidden_BH = hidden_BH.to(self.markov_w2.weight)
        last_N = _last(paths, hidden_BH)
        if self._kind == "rnn":
            before_NR = self._behind([path[:-1] for path in paths], hidden_BH, row - 1, paths[0][0], kept)
            _, found_NR = self._step(before_NR, last_N, hidden_BH[row])
        else:
            found_NR = self.markov_w1(last_N)
            if self._kind == "gated":
                found_NR = found_NR * self.gate_proj(_beside(hidden_BH[row], found_NR)).sigmoid()
        added_NS: Tensor = self.markov_w2(found_NR)
        return logits_S + added_NS[:, : len(logits_S)].to(logits_S)

    def _behind(self, paths: Items[Path], hidden_BH: Tensor, row: int, first: int, kept: Kept) -> Tensor:
        """The state [N, R] after the rows up to `row`, the last of which read the paths' last tokens.

        Rows before the first guess read the token that the block was filled behind, `first`.
        """
        if row < 0:
            return hidden_BH.new_zeros(len(paths), self.markov_w2.in_features)
        missing = [path for path in dict.fromkeys(paths) if path not in kept]
        if missing:
            before_NR = self._behind([path[:-1] for path in missing], hidden_BH, row - 1, first, kept)
            last_N = _last([path or (first,) for path in missing], hidden_BH)
            states_NR, _ = self._step(before_NR, last_N, hidden_BH[row])
            kept.update(zip(missing, states_NR, strict=True))
        return torch.stack([kept[path] for path in paths])

    def _step(self, state_NR: Tensor, last_N: Tensor, hidden_H: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, and what is said, [N, R] each."""
        read_NF = torch.cat([state_NR, self.markov_w1(last_N)], -1)
        read_NF = torch.cat([read_NF, hidden_H.expand(len(read_NF), -1)], -1)
        gate_NR, new_NR, said_NR = self.joint_proj(read_NF).chunk(3, -1)
        gate_NR = gate_NR.sigmoid()
        return gate_NR * state_NR + (1.0 - gate_NR) * new_NR.tanh(), said_NR.tanh()


def _last(paths: Items[Path], like: Tensor) -> Tensor:
    return torch.tensor([path[-1] for path in paths], device=like.device)


def _beside(hidden_H: Tensor, rows_NR: Tensor) -> Tensor:
    return torch.cat([hidden_H.expand(len(rows_NR), -1), rows_NR], -1)
