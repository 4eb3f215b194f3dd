"""A drafter's head cut down to frequent tokens: fewer rows to multiply, to add noise to and to sort.

FR-Spec (Zhao et al. 2025) keeps the most frequent tokens of a corpus, VocabTrim (Goel et al. 2025) those that the
target writes. Here both count, and the tokens of the texts being written are always in. What is left out cannot be
guessed, only written: the target reads and chooses from its whole vocabulary.
N rows   H hidden size   V vocabulary   S tokens of the cut head
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from specexec.drafters.retrieval.memory import Memory
from specexec.errors import BadDrafter
from specexec.learned import Arrays, sound
from specexec.model.tree_lm import TreeLM, head_alone
from specexec.sampling.scores import NoiseRows
from specexec.tree.tree import Floats, Ints, highest

ENOUGH = 100.0  # choices of the target that are worth choosing anew for
MEMORY = 1e5  # choices of the target that are remembered; older ones count half after as many more


class _Rows(nn.Module):
    """Some rows of a linear, in memory of their own."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self._whole = [whole]  # not a child: it stays where it is
        self.weight_SH = whole.weight.new_empty((0, whole.in_features))
        self.bias_S: Tensor | None = None

    def hold(self, ids_S: Tensor, room: int) -> None:
        """These rows; those that are held already, the first ones, are not copied again while there is room."""
        (whole,) = self._whole
        held, size = len(self.weight_SH), len(ids_S)
        buffer_RH = self.weight_SH._base
        if buffer_RH is None or held > size or size > len(buffer_RH):
            buffer_RH, held = whole.weight.new_empty((room, whole.in_features)), 0
        buffer_RH[held:size] = whole.weight.detach()[ids_S[held:]]
        self.weight_SH = buffer_RH[:size]
        self.bias_S = None if whole.bias is None else whole.bias.detach()[ids_S]

    def forward(self, rows_NH: Tensor) -> Tensor:
        return nn.functional.linear(rows_NH, self.weight_SH, self.bias_S)


@dataclass(frozen=True)
class Columns:
    """The noise of some tokens only."""

    noise: NoiseRows
    ids_S: Tensor

    def rows(self, positions: Iterable[int]) -> Tensor:
        """[P, S] float32 for P positions."""
        return self.noise.rows(positions)[:, self.ids_S]


def widened(logits_NS: Tensor, ids_S: Tensor, vocabulary: int) -> Tensor:
    """Logits of some tokens among those of all, [N, V]: -inf for the others."""
    wide_NV = logits_NS.new_full((len(logits_NS), vocabulary), float("-inf"))
    wide_NV[:, ids_S] = logits_NS
    return wide_NV


class TrimmedHead:
    """The `most` tokens that target and corpus use most, those `always` wanted, and those of the texts at hand.

    None of `never` is among them.

    Where nothing has been counted yet, low ids go first: tokenizers give them to what is frequent. Raises BadDrafter
    for a head that is no plain linear.
    """

    def __init__(
        self,
        lm: TreeLM,
        vocabulary: int,
        most: int,
        always: Iterable[int] = (),
        memory: Memory | None = None,
        never: Iterable[int] = (),
    ) -> None:
        whole = lm.model.get_output_embeddings()
        if not isinstance(whole, nn.Linear):
            raise BadDrafter(
                f"--draft-vocab cannot cut the head of this drafter ({type(whole).__name__}).", hint="Leave it out."
            )
        vocabulary = min(vocabulary, lm.vocabulary)
        self._never = np.array(sorted(token for token in never if token < vocabulary), np.int64)
        self.most = min(most, vocabulary - len(self._never))
        self.ids_S = torch.zeros(0, dtype=torch.long, device=lm.device)
        self._vocabulary, self._always, self._memory = vocabulary, list(always), memory
        self._lm, self._rows, self._head = lm, _Rows(whole), head_alone(lm.model)
        name = next(name for name, module in lm.model.named_children() if module is whole)
        self._head._modules[name] = self._rows
        self._known_V = np.zeros(vocabulary, bool)
        self._chosen_V = np.zeros(vocabulary)
        self._room = 0
        self._counted = 0.0  # choices that the present tokens were chosen by

    def meet(self, text: Items[int]) -> None:
        """Let these tokens in. All are chosen anew when as many as half have been let in, or twice as much is known."""
        tokens = np.unique(np.array([*text, *self._always], np.int64))
        tokens = np.setdiff1d(tokens[tokens < self._vocabulary], self._never)
        new = tokens[~self._known_V[tokens]]
        learned = self._chosen_V.sum() > 2 * self._counted + ENOUGH
        if not (len(new) or learned) and len(self.ids_S):
            return
        known = self.ids_S.cpu().numpy()
        if not len(known) or learned or len(known) + len(new) > self._room:
            self._counted = float(self._chosen_V.sum())
            frequency_V = self._frequency_V()
            frequency_V[self._never] = -1.0
            known = highest(frequency_V, self.most)
            new = np.setdiff1d(tokens, known)
            self._room = len(known) + len(new) + self.most // 2
            self._known_V[:] = False
            self._known_V[known] = True
            self._rows.weight_SH = self._rows.weight_SH[:0]
        self._known_V[new] = True
        self.ids_S = torch.from_numpy(np.concatenate([known, new])).to(self.ids_S.device)
        self._rows.hold(self.ids_S, self._room)

    def count(self, choices: Items[int]) -> None:
        """What the target chose, at nodes its text did not take too."""
        chosen = np.array(choices, np.int64)
        np.add.at(self._chosen_V, chosen[chosen < self._vocabulary], 1.0)
        if self._chosen_V.sum() > MEMORY:
            self._chosen_V /= 2

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Those of `ids_S`, [N, S] float32, by the model's own head code."""
        return self._lm.head(hidden_NH, self._head)

    def pack(self) -> Floats:
        """The tokens chosen most and how often, [2, most]."""
        often = np.argsort(-self._chosen_V, kind="stable")[: self.most]
        often = often[self._chosen_V[often] > 0]
        return np.stack([often.astype(np.float64), self._chosen_V[often]])

    def unpack(self, arrays: Arrays) -> None:
        """What an earlier run counted, under "chosen". Raises ValueError for tokens that do not exist."""
        tokens, counts = sound(arrays.get("chosen", np.zeros((2, 0))), (2, -1), "the tokens chosen most")
        if (tokens >= self._vocabulary).any():
            raise ValueError("tokens were counted that this vocabulary does not have")
        self._chosen_V[tokens.astype(np.int64)] = counts

    def _frequency_V(self) -> Floats:
        """Shares of the target's choices, of its earlier texts and of the corpus, added."""
        counts = [self._chosen_V]
        if self._memory is not None:
            counts += [self._count(self._memory.settled.tokens_E), self._count(self._memory.corpus.tokens_E)]
        return np.asarray(sum(count_V / max(count_V.sum(), 1.0) for count_V in counts))

    def _count(self, tokens_E: Ints | np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> Floats:
        return np.bincount(tokens_E[tokens_E < self._vocabulary], minlength=self._vocabulary).astype(np.float64)
