"""A drafter's logits as scores: what the target will compare, as far as a drafter can know.   N rows   V vocabulary"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.sampling import History, NoiseRows, SamplingParams, penalise, restrict, with_noise


@dataclass(frozen=True)
class Ranking:
    """s = draft logits + T * G, the noise the target itself will meet; children are ranked by softmax(s / tau).

    `tau=None` learns it (calibration.py). Without shared noise s is the draft logits alone, blind to chance.
    """

    tau: float | None = None
    shared_noise: bool = True

    def scores(
        self,
        logits_NV: Tensor,
        sampling: SamplingParams,
        noise: NoiseRows,
        positions: Items[int],
        histories: Items[History],
    ) -> Tensor:
        """[N, V] float32; row n scores the children at positions[n]. `histories` matter only under penalties."""
        scores_NV = logits_NV.float()
        if not self.shared_noise:
            return scores_NV
        if sampling.penalised:
            rows = zip(scores_NV, histories, strict=True)
            scores_NV = torch.stack([penalise(row_V, sampling, history) for row_V, history in rows])
        return with_noise(restrict(scores_NV, sampling), sampling.temperature or 0.0, noise, positions)
