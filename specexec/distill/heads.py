"""A head for the target of a recording, from nothing to a folder: what it will take, its training, its files."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from specexec.distill.batches import Texts
from specexec.distill.divergence import Loss
from specexec.distill.eagle3 import Eagle3Student
from specexec.distill.head_folder import write_eagle3
from specexec.distill.recording import Recording
from specexec.distill.training import OPTIMISER_B, Trained, TrainingPlan, train
from specexec.distill.vocabulary import frequent_ids

F32_B = 4
STEPS = 3  # guesses in a row that it learns to make


def usual_rate(hidden: int) -> float:
    """A learning rate for a layer of this width: 1e-3 at 600, the less the wider."""
    return 0.6 / hidden


@dataclass(frozen=True)
class HeadTraining:
    """Everything that decides what a head becomes. `vocabulary`: tokens that it names, at most."""

    recording: Recording
    texts: Texts
    plan: TrainingPlan
    vocabulary: int
    loss: Loss = "forward-kl"

    def student(self) -> Eagle3Student:
        """The head before its first step."""
        recording = self.recording
        ids = frequent_ids(recording, sorted({piece.text for piece in self.texts.taught}), self.vocabulary)
        student = Eagle3Student.new(
            recording.target, recording.taps, recording.shared(), ids, STEPS, self.plan.seed, self.loss
        )
        first = self.texts.epoch(0, self.plan.rows, self.plan.seed)[0]
        student.settle(self.texts.batch(first))
        return student

    def memory_B(self, student: Eagle3Student) -> int:
        """About what training takes: weights and averages, the target's embeddings, and what a batch leaves behind."""
        target, rows = self.recording.target, self.plan.rows
        trained = sum(one.numel() for one in student.trained.values())
        frozen = sum(one.numel() for one in student.head.parameters()) - trained
        own_B = OPTIMISER_B * trained + F32_B * frozen + student.embeddings_VH.nbytes
        # Of each row and step: logits with their gradients, and some twenty vectors of the layer.
        row_B = F32_B * STEPS * (4 * student.names + 20 * target.hidden)
        return own_B + rows * row_B + rows * (len(self.recording.taps) + 1) * target.hidden * F32_B

    def run(
        self, student: Eagle3Student, folder: Path, device: torch.device, half: bool
    ) -> Generator[Trained, None, None]:
        """Train, from a checkpoint in `folder` where there is one, and write the head there. Raises as `train` does."""
        student.to(device)
        yield from train(student, self.texts, self.plan, folder, device, half)
        write_eagle3(student, self.recording, folder)
