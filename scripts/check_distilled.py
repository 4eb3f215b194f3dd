"""A head that `specexec distill head` has written, in the hands of the package whose layout it has.

    scripts/with_speculators python scripts/check_distilled.py HEAD RECORDED

`speculators` 0.9.0 loads HEAD, takes embeddings and head from the model that config.json names, and computes along a
text of RECORDED: three steps of an EAGLE-3 head, the first of an MTP layer (later ones attend to other rows there), a
block of a DFlash head. The largest difference from what the head computed in training is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from offload.machine.atomic_write import replace_with
from specexec.distill.batches import Excerpt, TextBatch, Texts
from specexec.distill.dflash import BLOCK, DFlashStudent, DrawnBlocks
from specexec.distill.eagle3 import Eagle3Student
from specexec.distill.layers import SharedWithTarget
from specexec.distill.mtp import MtpStudent
from specexec.distill.recording import Recording
from specexec.distill.unrolled import STEPS
from specexec.drafters.heads.mtp_fields import PUBLISHED, START

MASKED = 128  # rows to a block of the package's masks: of a text above that it takes whole blocks alone
Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""What is compared: ours, and theirs."""


class Trained:
    """A head as its folder has it, and a text that it did not learn from."""

    def __init__(self, folder: Path, recorded: Path) -> None:
        self.folder, self.recording = folder, Recording.open(recorded, replace_with)
        self.settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        texts = Texts.of(self.recording, 256)
        number = texts.held_out[0].text
        self.batch: TextBatch = texts.batch([Excerpt(number, 0, self.recording.length(number))])
        tensors = load_file(folder / "model.safetensors")
        whole = torch.arange(self.recording.target.vocabulary)
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"])) if "d2t" in tensors else whole
        self.shared = SharedWithTarget.of(self.recording.shared(), ids)
        self.weights = {name: one.float() for name, one in tensors.items() if name not in ("d2t", "t2d")}

    def theirs(self, module: str, name: str) -> nn.Module:
        """The model that the package makes of the folder."""
        made: nn.Module = getattr(import_module(module), name).from_pretrained(self.folder).float().eval()
        if "verifier_lm_head" in made._modules:
            # It fills in the target's embeddings where it finds NaN; transformers 5.23 leaves zeros. MTP has done so.
            nn.init.constant_(made.get_parameter("embed_tokens.weight"), torch.nan)
            fill: Callable[[], None] = getattr(made, "load_verifier_weights")  # noqa: B009 - no part of nn.Module
            fill()
        return made


def eagle3(one: Trained) -> Pairs:
    """All steps."""
    student = Eagle3Student.new(one.recording.target, one.recording.taps, one.shared, 0, "forward-kl")
    student.head.load_state_dict(one.weights)
    model, steps = one.theirs("speculators.models.eagle3.core", "Eagle3DraftModel"), list[Tensor]()
    model.get_submodule("lm_head").register_forward_hook(lambda *args: steps.append(args[-1][0].clone()))
    states_BRF, tokens_BR = one.batch.states_BRF[:, :-1].float(), one.batch.tokens_BR[:, 1:]
    count = tokens_BR.shape[1]
    more = -count % MASKED  # rows of another text behind it, which none of its own sees
    documents_BR = pad(torch.zeros_like(tokens_BR), (0, more), value=1)
    model(pad(states_BRF, (0, 0, 0, more)), pad(tokens_BR, (0, more)), documents_BR, ttt_steps=STEPS)
    for number, step in enumerate(student.unrolled(one.batch)):
        yield f"step {number}", step.logits_KD, steps[number][:count][step.asked.rows_BR[0]]


def mtp(one: Trained) -> Pairs:
    """The first step."""
    student = MtpStudent.new(one.recording.target, one.shared, 0, "forward-kl")
    student.head.load_state_dict({START + name.removeprefix(PUBLISHED): it for name, it in one.weights.items()})
    model = one.theirs("speculators.models.mtp.core", "MTPDraftModel")
    (first, *_), *_ = model(one.batch.tokens_BR, one.batch.last_BRH.float())
    step = next(iter(student.unrolled(one.batch)))
    rows_R = step.asked.rows_BR[0][: first.shape[1]]
    yield "step 0", step.logits_KD[: int(rows_R.sum())], first[0][rows_R]


def dflash(one: Trained) -> Pairs:
    """The block behind the first token of the answer."""
    mask = int(one.settings["mask_token_id"])
    student = DFlashStudent.new(one.recording.target, one.recording.taps, one.shared, mask, 0, "forward-kl")
    student.head.load_state_dict({name: it for name, it in one.weights.items() if name != "lm_head.weight"})
    model = one.theirs("speculators.models.dflash.core", "DFlashDraftModel")
    at, batch = int(one.batch.answer_BR[0].nonzero()[0]), one.batch
    only_B = torch.zeros_like(batch.answer_BR)
    only_B[0, at] = True
    documents = torch.zeros_like(batch.tokens_BR)
    forward: Callable[..., tuple[Tensor, ...]] = getattr(model, "_backbone_forward")  # noqa: B009 - as its forward does
    states = batch.states_BRF.float(), batch.tokens_BR, only_B, batch.last_BRH.float(), documents
    hidden, *_ = forward(*states, max_anchors=1)
    ours_BAKH, _ = student._filled(batch, DrawnBlocks(torch.tensor([[at]]), torch.ones(1, 1, dtype=torch.bool)))
    yield "block", ours_BAKH[0, 0], hidden[0, 1:BLOCK]


def main(folder: Path, recorded: Path) -> None:
    """Compare, and print."""
    one = Trained(folder, recorded)
    compared = {"eagle3": eagle3, "mtp": mtp, "dflash": dflash}[one.settings["speculators_model_type"]]
    with torch.no_grad():
        for what, ours, theirs in compared(one):
            far, most = (ours - theirs).abs().max(), theirs.abs().max()
            print(f"{what}: {len(ours)} rows, largest difference {far:.2g} of values up to {most:.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
