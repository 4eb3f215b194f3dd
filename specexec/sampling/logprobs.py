"""Log-probabilities of written tokens under the model itself.   N rows   H hidden size   V vocabulary   K likeliest"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from torch import Tensor

from specexec.sizes import HEAD_ROWS
from specexec.stats import Logprob


def logprobs(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, tokens: Items[int], most: int) -> tuple[Logprob, ...]:
    """log softmax(logits) of tokens[n] after row n, natural logarithms, and the `most` likeliest tokens there.

    `head` makes float32 logits of hidden states, [R, H] → [R, V]; it gets at most HEAD_ROWS rows at a time.
    """
    found: list[Logprob] = []
    for start in range(0, len(tokens), HEAD_ROWS):
        chosen = tokens[start : start + HEAD_ROWS]
        log_probs_NV = head(hidden_NH[start : start + len(chosen)]).log_softmax(-1)
        likeliest_NK = log_probs_NV.topk(min(most, log_probs_NV.shape[-1]))
        tops = zip(likeliest_NK.indices.tolist(), likeliest_NK.values.tolist(), strict=True)
        own = log_probs_NV[range(len(chosen)), list(chosen)].tolist()
        for token, logprob, (ids, values) in zip(chosen, own, tops, strict=True):
            found.append(Logprob(token, logprob, tuple(zip(ids, values, strict=True))))
    return tuple(found)
