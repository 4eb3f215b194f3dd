"""Which tokens a head names: the most frequent ones of what the target wrote and nearly wrote.

V vocabulary   D tokens that a head names
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from specexec.distill.recording import Recording


def frequent_ids(recording: Recording, texts: Iterable[int], most: int) -> Tensor:
    """int64 [D], ascending: the `most` tokens that are expected most often in answers, or all.

    A token counts by its probability at every place of an answer, so that those which another seed would have written
    count too; each that was written counts once more. Of those never seen the first ones fill up.
    """
    vocabulary = recording.target.vocabulary
    if most >= vocabulary:
        return torch.arange(vocabulary)
    expected_V = torch.zeros(vocabulary)
    for text in texts:
        one = recording.read(text)
        before = one.answer_R.roll(-1)
        before[-1] = False
        ids, found = one.top_ids_RN[before].long().flatten(), one.top_log_probs_RN[before].float().exp().flatten()
        expected_V.index_add_(0, ids, found)
        written = one.tokens_R[one.answer_R]
        expected_V.index_add_(0, written, torch.ones(len(written)))
    return expected_V.sort(descending=True, stable=True).indices[:most].sort().values


def never_seen(recording: Recording, texts: Iterable[int]) -> int:
    """The last token that these texts do not have; the very last where they have all."""
    seen_V = torch.zeros(recording.target.vocabulary, dtype=torch.bool)
    for text in texts:
        seen_V[recording.tokens(text)[0].long()] = True
    unseen = (~seen_V).nonzero().flatten()
    return int(unseen[-1]) if len(unseen) else len(seen_V) - 1
