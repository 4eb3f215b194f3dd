"""A drafter's logits as scores: what the target will compare, as far as a drafter can know.   N rows   V vocabulary"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor

from specexec.sampling.filters import restrict
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, processed
from specexec.sampling.scores import NoiseRows, with_noise


@dataclass(frozen=True)
class Ranking:
    """s = draft logits + T * G, the noise the target itself will use; children are ranked by softmax(s / tau).

    `tau=None` learns it (calibration.py). Without shared noise s is the draft logits alone.
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
        allowed_NV = restrict(processed(scores_NV, histories), sampling)
        dead_N1 = (allowed_NV == float("-inf")).all(-1, keepdim=True)  # the text ends there, whatever is guessed
        return with_noise(allowed_NV.where(~dead_N1, scores_NV), sampling.temperature or 0.0, noise, positions)
