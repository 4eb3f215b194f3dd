"""`--exact`: near-ties are decided by recomputing the text alone, whichever sweep they appeared in.

Two scores closer than rounding may change places when a token is computed among other rows. Such a choice is put to the
target again: the whole text in one sweep of its own, which gives the same bits in plain and in guessed decoding. So is
a choice that a token at the edge of top-k, top-p or min-p could win or lose.   V vocabulary   H hidden size
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, Sweep

ULPS = 2.0  # of the model's own dtype: each of two logits may be rounded the other way
ULPS_F32 = 32.0  # sums over long rows, in another order: up to 8 were seen


class Head(Protocol):
    """What deciding again needs of a target."""

    def begin(self, parts: list[Rows]) -> Sweep: ...

    def head(self, hidden_RH: Tensor) -> Tensor: ...


@dataclass
class ExactTies:
    """Decides near-ties again. Keeps the bill: choices seen, decided again, changed, seconds, the largest rounding."""

    target: Head
    dtype: torch.dtype
    choices: int = 0
    again: int = 0
    changed: int = 0
    seconds: float = 0.0
    widest: float = 0.0

    def settled(
        self,
        text: Items[int],
        prompt: int,
        scores_V: Tensor,
        rescore: Callable[[Tensor], Tensor],
        edge: Callable[[float], bool] = lambda unit: False,
    ) -> Tensor:
        """The scores that count after `text`, whose first `prompt` tokens are a prompt.

        `rescore` makes scores of logits, `scores_V` are those of the sweep.

        `edge` says whether logits that are off by so much could let a filter decide otherwise.
        """
        self.choices += 1
        first, *others = scores_V.topk(min(2, len(scores_V))).values.tolist()
        unit = self._unit * max(abs(first), 1.0)
        if not any(first - second <= unit for second in others) and not edge(unit):
            return scores_V
        began = time.perf_counter()
        (hidden_RH,) = self.target.begin([Rows.text(KVCache(prompt=prompt), list(text))]).result()
        new_V = rescore(self.target.head(hidden_RH[-1:])[0])
        best, new_best = int(scores_V.argmax()), int(new_V.argmax())
        self.again += 1
        self.changed += int(new_best != best)
        moved = (new_V[[best, new_best]] - scores_V[[best, new_best]]).abs()
        self.widest = max([self.widest, *moved[moved.isfinite()].tolist()])  # what a filter let in or out moved by inf
        self.seconds += time.perf_counter() - began
        return new_V

    @property
    def _unit(self) -> float:
        """How far two scores of size 1 may lie apart by rounding alone."""
        return max(ULPS * torch.finfo(self.dtype).eps, ULPS_F32 * torch.finfo(torch.float32).eps)
