"""One call of the head for the rows of several texts: its weights, the largest single ones of a model, are read once.

M rows of one text   H hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from specexec.sizes import HEAD_ROWS


def logits_of_texts(head: Callable[[Tensor], Tensor], hidden: Items[Tensor]) -> Iterator[Tensor | None]:
    """Logits [M, V] of each text's rows [M, H], in their order; None for a text with more than HEAD_ROWS rows.

    `head` makes float32 logits of hidden states, [R, H] → [R, V], whose rows do not depend on what comes along. It gets
    at most HEAD_ROWS rows, when the first of their texts is asked for; no logits are kept for longer than their texts.

    >>> rows = [torch.tensor([[1.0]]), torch.tensor([[2.0], [3.0]])]
    >>> def head(hidden_RH: Tensor) -> Tensor:
    ...     print(len(hidden_RH), "rows")
    ...     return hidden_RH * 10
    >>> [found.tolist() for found in logits_of_texts(head, rows)]
    3 rows
    [[[10.0]], [[20.0], [30.0]]]
    """
    together: list[Tensor] = []
    for hidden_MH in hidden:
        if sum(map(len, together)) + len(hidden_MH) > HEAD_ROWS:
            yield from _split(head, together)
            together = []
        if len(hidden_MH) > HEAD_ROWS:
            yield None
        else:
            together.append(hidden_MH)
    yield from _split(head, together)


def _split(head: Callable[[Tensor], Tensor], together: list[Tensor]) -> Iterator[Tensor]:
    if together:
        yield from head(torch.cat(together)).split(list(map(len, together)))
