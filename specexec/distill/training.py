"""The loop that trains: AdamW over batches of recorded texts, with checkpoints that it continues from exactly.

Knows no kind of drafter and no screen.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specexec.distill.batches import TextBatch, Texts
from specexec.distill.divergence import Loss
from specexec.distill.recording import Recording
from specexec.errors import BadCheckpoint

CHECKPOINT = "training.safetensors"
KEEP_EVERY_S = 60.0
REPORTS = 8  # times that what is held out is looked at
WARM_UP = 0.05  # of all steps
LEAST_RATE = 0.1  # of the learning rate, at the end
CLIP = 1.0
OPTIMISER_B = 16  # of a number that is trained: itself, its gradient and two averages
DISK_B = 28  # the same: two checkpoints of itself and two averages, and itself in the end


class Student(Protocol):
    """What is trained, and by which loss."""

    @property
    def loss_kind(self) -> Loss: ...

    @property
    def trained(self) -> dict[str, nn.Parameter]: ...

    def loss(self, batch: TextBatch, step: int) -> Tensor: ...

    def accepted(self, batch: TextBatch) -> tuple[int, int]: ...


@dataclass(frozen=True)
class TrainingPlan:
    """How it is trained. `rows`: tokens of a batch; `rate`: AdamW's, at its highest."""

    epochs: int
    rows: int
    rate: float
    seed: int = 0

    def rate_at(self, step: int, steps: int) -> float:
        """Rises in a straight line first, then falls as a cosine does."""
        warm = max(round(WARM_UP * steps), 1)
        if step < warm:
            return self.rate * (step + 1) / warm
        fallen = (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2
        return self.rate * (LEAST_RATE + (1 - LEAST_RATE) * fallen)


@dataclass(frozen=True)
class Trained:
    """After a step. `accepted`: guesses in a row that held-out texts have too, a mean; where they were looked at."""

    step: int
    steps: int
    loss: float
    accepted: float | None = None


def train(
    student: Student, texts: Texts, plan: TrainingPlan, folder: Path, device: torch.device, half: bool
) -> Generator[Trained, None, None]:
    """Train to the end, from the checkpoint in `folder` where there is one; says what came of each step.

    Left early it keeps a checkpoint, and what is trained from there is what would have been trained. `half`: products
    in bfloat16, weights in float32. Raises BadCheckpoint for one that was begun otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW(student.trained.values(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    epochs = [texts.epoch(number, plan.rows, plan.seed) for number in range(plan.epochs)]
    batches = [pieces for epoch in epochs for pieces in epoch]
    steps = len(batches)
    begun = asdict(plan) | {"taught": [asdict(piece) for piece in texts.taught], "half": half}
    begun |= {"loss": student.loss_kind, "target": asdict(texts.recording.target), "taps": [*texts.recording.taps]}
    begun |= {"recording": texts.name}
    done = kept = _continued(student, optimiser, begun, folder / CHECKPOINT)
    products = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    if not done:
        yield Trained(0, steps, math.nan, held_out(student, texts, plan.rows, device, half))
    saved_s = monotonic()
    try:
        for step in range(done, steps):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate_at(step, steps)
            with products:
                loss = student.loss(_on(texts.batch(batches[step]), device), step)
            loss.backward()
            nn.utils.clip_grad_norm_(student.trained.values(), CLIP)
            optimiser.step()
            optimiser.zero_grad()
            done = step + 1
            if monotonic() - saved_s > KEEP_EVERY_S:
                _keep(student, optimiser, begun, done, texts.recording, folder)
                kept, saved_s = done, monotonic()
            looks = done == steps or done % max(steps // REPORTS, 1) == 0
            now = held_out(student, texts, plan.rows, device, half) if looks else None
            yield Trained(done, steps, float(loss.detach()), now)
    except GeneratorExit:  # left between two steps; after any other error a step may be half done
        if done > kept:
            _keep(student, optimiser, begun, done, texts.recording, folder)
        raise
    if done > kept:
        _keep(student, optimiser, begun, done, texts.recording, folder)


def held_out(student: Student, texts: Texts, rows: int, device: torch.device, half: bool) -> float:
    """Guesses in a row that texts which were not learned from have too, a mean over the places of their answers."""
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        counts = [student.accepted(_on(batch, device)) for batch in texts.held_out_batches(rows)]
    return sum(right for right, _ in counts) / max(sum(places for _, places in counts), 1)


def _on(batch: TextBatch, device: torch.device) -> TextBatch:
    return replace(batch, **{name: one.to(device) for name, one in vars(batch).items()})


def _keep(
    student: Student, optimiser: torch.optim.Optimizer, begun: dict[str, object], done: int, recording: Recording,
    folder: Path,
) -> None:  # fmt: skip
    """Weights by their names, AdamW's averages by theirs and the place of the weight among them."""
    tensors = {f"weights/{name}": one.detach().cpu() for name, one in student.trained.items()}
    for place, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{place}/{name}": one.cpu() for name, one in state.items()}
    recording.save(folder / CHECKPOINT, tensors, {"begun": json.dumps(begun), "done": str(done)})


def _continued(student: Student, optimiser: torch.optim.Optimizer, begun: dict[str, object], path: Path) -> int:
    """Steps that are done already."""
    if not path.exists():
        return 0
    again = "--overwrite to begin again, or another -o."
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as problem:
        raise BadCheckpoint(f"{path} is damaged.", str(problem), again) from problem
    then = json.loads(said.get("begun", "{}"))
    if differ := [name for name, value in begun.items() if then.get(name) != value]:
        raise BadCheckpoint(
            f"{path} was begun with other {'texts' if differ[0] in ('taught', 'recording') else differ[0]}.",
            hint=f"the old settings and texts, {again}",
        )
    wanted = {f"weights/{name}": one.shape for name, one in student.trained.items()}
    if wanted != {name: one.shape for name, one in kept.items() if name.startswith("weights/")}:
        raise BadCheckpoint(f"{path} is of another kind of drafter.", hint=again)
    averages = defaultdict[int, dict[str, Tensor]](dict)
    with torch.no_grad():
        for key, one in kept.items():
            kind, _, rest = key.partition("/")
            if kind == "weights":
                student.trained[rest].copy_(one)
            else:
                place, _, name = rest.partition("/")
                averages[int(place)][name] = one
    optimiser.load_state_dict({"state": averages, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(said["done"])
