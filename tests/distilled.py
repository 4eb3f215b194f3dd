"""Heads that were trained on a small target, whose next token follows from its last alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from offload.machine.atomic_write import replace_with
from specexec.distill.batches import Texts
from specexec.distill.heads import HeadKind, HeadTraining
from specexec.distill.recording import RecordedTarget, RecordedText, Recording
from specexec.distill.training import TrainingPlan
from specexec.drafters.heads.eagle import Eagle, loaded
from specexec.engine.readings import TextReader, shared_tensors
from specexec.model.tree_lm import TreeLM
from tests.eagle_models import HIDDEN, LAYERS, VOCABULARY, chain_target
from tests.writing import prompt

CPU = torch.device("cpu")
TAPS = (0, 1, 2)
PLAN = TrainingPlan(epochs=8, rows=256, rate=1e-2)


class Taught:
    """The target, a recording of it, and a head that has learned from that."""

    def __init__(self, folder: Path, kind: HeadKind, plan: TrainingPlan = PLAN) -> None:
        model = chain_target(folder / "target")
        prompts = torch.tensor([prompt(4, seed, VOCABULARY) for seed in range(60)])
        texts: list[list[int]] = model.generate(prompts, max_new_tokens=24, do_sample=False).tolist()  # type: ignore[operator]
        self.target = TreeLM(model)
        about = RecordedTarget("a/chain", "LlamaForCausalLM", HIDDEN, LAYERS, VOCABULARY, 512, "none")
        self.recording = Recording(folder / "recorded", about, TAPS, 8, {}, replace_with)
        self.recording.begin(shared_tensors(self.target))
        reader = TextReader(self.target, [*TAPS, LAYERS], 8)
        for number, (text, read) in enumerate(zip(texts, reader.read(texts, lambda _: True), strict=True)):
            states_RTH = torch.stack([read.states[layer] for layer in (*TAPS, LAYERS)], 1)
            answer_R = torch.arange(len(text)) >= 4
            one = RecordedText(torch.tensor(text), answer_R, states_RTH, read.top_ids_RN, read.top_log_probs_RN)
            self.recording.keep(number, "drawn", one)
        self.texts = Texts.of(self.recording, 64)
        self.training = HeadTraining(self.recording, self.texts, plan, 64, kind=kind)
        self.student, self.folder = self.training.student(), folder / "head"
        self.course = list(self.training.run(self.student, self.folder, CPU, half=False))

    @property
    def settings(self) -> dict[str, object]:
        """config.json of the head."""
        found: dict[str, object] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the head."""
        return load_file(self.folder / "model.safetensors")

    @property
    def head(self) -> Eagle:
        """The EAGLE-3 head as it is loaded."""
        return loaded(self.settings, self.tensors, self.target, "head")
