"""A drafter's logits as scores: what the target will compare, as far as a drafter can know.

N rows   V vocabulary   S tokens that are named   C candidates
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.drafters.trimmed_head import Columns, widened
from specexec.sampling.filters import restrict
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, processed
from specexec.sampling.scores import NoiseRows, with_noise
from specexec.text.sequence import Sequence


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


@dataclass(frozen=True)
class NamedLogits:
    """A head's answer: logits of all tokens that may be guessed, or of `ids_S` alone, and the noise of the same."""

    logits_NV: Tensor
    noise: NoiseRows
    ids_S: Tensor | None = None

    def tokens(self, columns_NC: Tensor) -> Tensor:
        """The tokens of these columns."""
        return columns_NC if self.ids_S is None else self.ids_S[columns_NC]


class Named:
    """What the logits of a head stand for: the tokens 0, 1, 2, …, or `ids`; it names none of `never`.

    `rows`: the tokens that the model of the head has. Those from `vocabulary` on, which is the target's, are padding
    and never named either.
    """

    def __init__(
        self,
        rows: int,
        vocabulary: int,
        never: Iterable[int],
        device: torch.device,
        ids: Items[int] | None = None,
    ) -> None:
        self.device = device
        self.vocabulary = min(rows, vocabulary) if ids is None else rows
        self.ids_S = None if ids is None else torch.tensor(ids, device=device)
        named, left_out = range(self.vocabulary) if ids is None else ids, {*never}
        columns = [column for column, one in enumerate(named) if one in left_out or one >= vocabulary]
        self._never = torch.tensor(columns, dtype=torch.long, device=device)

    def cut(self, logits_NS: Tensor) -> Tensor:
        """Those of the tokens that it names, the others of them as low as can be."""
        logits_NS = logits_NS[:, : self.vocabulary] if self.ids_S is None else logits_NS
        return logits_NS.index_fill_(1, self._never, float("-inf")) if len(self._never) else logits_NS

    def among(self, sequence: Sequence, logits_NS: Tensor, ids_S: Tensor | None = None) -> NamedLogits:
        """With the noise of the same tokens: `ids_S`, where the head was cut down to them; else its own.

        Penalties, biases and grammars are about all tokens.
        """
        ids_S, sampling = self.ids_S if ids_S is None else ids_S, sequence.sampling
        noise = sequence.noise.on(self.device)
        if ids_S is None:
            return NamedLogits(logits_NS, noise)
        if sampling.penalised or sampling.logit_bias or sequence.parse is not None:
            return NamedLogits(widened(logits_NS, ids_S, self.vocabulary), noise)
        return NamedLogits(logits_NS, Columns(noise, ids_S), ids_S)
