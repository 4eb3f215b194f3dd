"""A small model that learns to draft: any transformers causal LM with the target's tokens (DistillSpec, FastDraft).

B texts   R tokens   V rows of the target's vocabulary   S of the small model's   K places whose next token is labelled
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specexec.distill.batches import TextBatch, Texts
from specexec.distill.divergence import Labels, Loss, divergence
from specexec.distill.recording import RecordedTarget
from specexec.distill.training import OPTIMISER_B, Trained, TrainingPlan, train

STEPS = 3  # guesses in a row that are counted
F32_B = 4
LIVE = 34  # numbers of each row and layer that wait for the way back, in hidden sizes


def usual_rate(student: SmallModel) -> float:
    """A learning rate for a model that has learned before: a tenth of a new layer's of this width."""
    return 0.06 / int(student.model.config.get_text_config().hidden_size)


@dataclass
class SmallModel:
    """A model in training, and its row of each token of the target: the same, -1 where it has none."""

    model: PreTrainedModel
    place_V: Tensor
    loss_kind: Loss
    trained: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = dict(self.model.named_parameters())

    @classmethod
    def of(cls, model: PreTrainedModel, target: RecordedTarget, loss: Loss) -> SmallModel:
        """A model in float32, `config.dtype` what it is saved in; its tokens must mean what the target's do."""
        places_V = torch.arange(target.vocabulary)
        rows = int(model.config.get_text_config().vocab_size)
        return cls(model, torch.where(places_V < rows, places_V, -1), loss)

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.model.to(device)  # type: ignore[arg-type]  # its own annotation leaves devices out
        self.place_V = self.place_V.to(device)

    def memory_B(self, rows: int) -> int:
        """About what training takes, at so many tokens of a batch."""
        config = self.model.config.get_text_config()
        numbers = sum(one.numel() for one in self.trained.values())
        row_B = F32_B * (LIVE * config.num_hidden_layers * config.hidden_size + 4 * config.vocab_size)
        return OPTIMISER_B * numbers + rows * row_B

    def loss(self, batch: TextBatch, step: int) -> Tensor:
        """Mean over the tokens of answers."""
        logits_KS, read_BR, _ = self._logits(batch)
        labels = Labels.of(batch.top_ids_BRN[read_BR], batch.top_log_probs_BRN[read_BR], self.place_V)
        return divergence(logits_KS, labels, self.loss_kind).mean()

    @torch.no_grad()
    def accepted(self, batch: TextBatch) -> tuple[int, int]:
        """Guesses in a row that the text has too, each its best, over all places of answers; and those places.

        Where a guess is the text's own token, the next one is what the model says behind the text.
        """
        logits_KS, read_BR, said_BR = self._logits(batch)
        hit_BR = torch.zeros_like(said_BR)
        hit_BR[said_BR] = logits_KS.argmax(-1) == self.place_V[batch.tokens_BR[said_BR]]
        right_BR, total = hit_BR, int(hit_BR.sum())
        for step in range(1, STEPS):
            right_BR = right_BR & nn.functional.pad(hit_BR[:, step:], (0, step))
            total += int(right_BR.sum())
        return total, int(read_BR.sum())

    def _logits(self, batch: TextBatch) -> tuple[Tensor, Tensor, Tensor]:
        """At the places before each token of an answer; and which these are, and which tokens, bool [B, R] each."""
        said_BR = batch.answer_BR.clone()
        said_BR[:, 0] = False
        read_BR = nn.functional.pad(said_BR[:, 1:], (0, 1))
        # Padding lies behind every text, so that nothing sees it.
        logits_BRS: Tensor = self.model(input_ids=batch.tokens_BR, use_cache=False).logits
        return logits_BRS[read_BR], read_BR, said_BR


def train_model(
    small: SmallModel, texts: Texts, plan: TrainingPlan, folder: Path, device: torch.device, half: bool
) -> Generator[Trained, None, None]:
    """Train, from a checkpoint in `folder` where there is one, and write a transformers folder. Raises as `train`."""
    small.to(device)
    small.model.train()
    yield from train(small, texts, plan, folder, device, half)
    dtype = small.model.config.dtype
    assert isinstance(dtype, torch.dtype)
    nn.Module.to(small.model, dtype)
    small.model.save_pretrained(folder)
