"""How a drafter's logits become log P(the target chooses this child).   N rows   V vocabulary"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.sampling import History, NoiseRows, SamplingParams, penalise, restrict, with_noise

NEUTRAL_TAU = 0.85


@dataclass(frozen=True)
class Ranking:
    """softmax(s / tau) over s = draft logits + T * G, the noise the target itself will meet (design: one noise).

    Without shared noise s is the draft logits alone: the tree is then blind to chance.
    """

    tau: float = NEUTRAL_TAU
    shared_noise: bool = True

    def log_probs(
        self,
        logits_NV: Tensor,
        sampling: SamplingParams,
        noise: NoiseRows,
        positions: Items[int],
        histories: Items[History],
    ) -> Tensor:
        """[N, V] float32; row n ranks the children at positions[n]. `histories` matter only under penalties."""
        scores_NV = logits_NV.float()
        if self.shared_noise:
            if sampling.penalised:
                rows = zip(scores_NV, histories, strict=True)
                scores_NV = torch.stack([penalise(row_V, sampling, history) for row_V, history in rows])
            scores_NV = with_noise(restrict(scores_NV, sampling), sampling.temperature or 0.0, noise, positions)
        return (scores_NV / self.tau).log_softmax(-1)
