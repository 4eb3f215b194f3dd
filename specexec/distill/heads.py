"""A head for the target of a recording, from nothing to a folder: what it will take, its training, its files."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, get_args

import torch

from specexec.distill.batches import TextBatch, Texts
from specexec.distill.dflash import DFlashStudent
from specexec.distill.divergence import Loss
from specexec.distill.eagle3 import Eagle3Student
from specexec.distill.head_folder import PublishedHead, write_head
from specexec.distill.layers import SharedWithTarget
from specexec.distill.mtp import MtpStudent
from specexec.distill.recording import Recording
from specexec.distill.training import OPTIMISER_B, Student, Trained, TrainingPlan, train
from specexec.distill.vocabulary import frequent_ids, never_seen

F32_B = 4
HeadKind: TypeAlias = Literal["eagle3", "dflash", "mtp"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)


class HeadStudent(Student, PublishedHead, Protocol):
    """A head in training."""

    @property
    def row_numbers(self) -> int:
        """Numbers in float32 that wait for the way back, of each token of a batch."""
        ...

    def to(self, device: torch.device) -> None: ...

    def settle(self, batch: TextBatch) -> None: ...


def usual_rate(hidden: int) -> float:
    """A learning rate for a layer of this width: 1e-3 at 600, the less the wider."""
    return 0.6 / hidden


@dataclass(frozen=True)
class HeadTraining:
    """Everything that decides what a head becomes. `vocabulary`: tokens that it names, at most; an MTP layer all."""

    recording: Recording
    texts: Texts
    plan: TrainingPlan
    vocabulary: int
    loss: Loss = "forward-kl"
    kind: HeadKind = "eagle3"

    def student(self) -> HeadStudent:
        """The head before its first step."""
        student = self._new()
        first = self.texts.epoch(0, self.plan.rows, self.plan.seed)[0]
        student.settle(self.texts.batch(first))
        return student

    def _new(self) -> HeadStudent:
        recording, target, seed = self.recording, self.recording.target, self.plan.seed
        taught = sorted({piece.text for piece in self.texts.taught})
        most = target.vocabulary if self.kind == "mtp" else self.vocabulary
        shared = SharedWithTarget.of(recording.shared(), frequent_ids(recording, taught, most))
        if self.kind == "mtp":
            return MtpStudent.new(target, shared, seed, self.loss)
        if self.kind == "dflash":
            mask = never_seen(recording, taught)
            return DFlashStudent.new(target, recording.taps, shared, mask, seed, self.loss)
        return Eagle3Student.new(target, recording.taps, shared, seed, self.loss)

    def memory_B(self, student: HeadStudent) -> int:
        """About what training takes: weights and averages, what the target shares, and what a batch leaves behind."""
        target, rows = self.recording.target, self.plan.rows
        trained = sum(one.numel() for one in student.trained.values())
        read_B = (len(self.recording.taps) + 1) * target.hidden * F32_B
        return OPTIMISER_B * trained + student.shared.nbytes + rows * (F32_B * student.row_numbers + read_B)

    def run(
        self, student: HeadStudent, folder: Path, device: torch.device, half: bool
    ) -> Generator[Trained, None, None]:
        """Train, from a checkpoint in `folder` where there is one, and write the head there. Raises as `train` does."""
        student.to(device)
        yield from train(student, self.texts, self.plan, folder, device, half)
        write_head(student, self.kind, self.recording, folder)
