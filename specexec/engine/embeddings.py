"""Texts as vectors: the target's own final hidden states, pooled. Many texts share one sweep.

R rows of one text   H hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Literal, Protocol, TypeAlias

from torch import Tensor
from torch.nn.functional import normalize

from specexec.engine.together import in_sweeps
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows

Pooling: TypeAlias = Literal["mean", "last"]


class ReadingTarget(Protocol):
    """What is needed of the model (tree_lm.py, chain_lm.py)."""

    def forward(self, parts: list[Rows]) -> list[Tensor]: ...


def embeddings(
    target: ReadingTarget, texts: Items[list[int]], pooling: Pooling, fits: Callable[[list[int]], bool]
) -> Iterator[Tensor]:
    """A vector of length 1 for each text in its order, [H] float32: the mean of its tokens' states, or the last one.

    `fits` says whether texts of so many tokens each go into one sweep; a single text always does.
    """
    for together in in_sweeps(texts, fits):
        for hidden_RH in target.forward([Rows.text(KVCache(), text) for text in together]):
            states_RH = hidden_RH.float()
            yield normalize(states_RH.mean(0) if pooling == "mean" else states_RH[-1], dim=0).cpu()
