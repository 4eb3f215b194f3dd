"""A head that `specexec distill head` has written, in the hands of the package whose layout it has.

    python scripts/check_distilled.py HEAD RECORDED

`speculators` 0.9.0 loads HEAD (pip install --no-deps, with hs-connectors 0.9.0, loguru and pydantic-settings), takes
embeddings from the model that config.json names, and computes three steps along a text of RECORDED; the largest
difference from what the head computed in training is printed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from offload.machine.atomic_write import replace_with
from specexec.distill.batches import Excerpt, Texts
from specexec.distill.eagle3 import Eagle3Student
from specexec.distill.layers import SharedWithTarget
from specexec.distill.recording import Recording
from specexec.distill.unrolled import STEPS


def main(folder: Path, recorded: Path) -> None:
    """Compare, and print."""
    recording = Recording.open(recorded, replace_with)
    texts = Texts.of(recording, 256)
    number = texts.held_out[0].text
    batch = texts.batch([Excerpt(number, 0, recording.length(number))])
    tensors = load_file(folder / "model.safetensors")
    whole = torch.arange(recording.target.vocabulary)
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"])) if "d2t" in tensors else whole
    shared = SharedWithTarget.of(recording.shared(), ids)
    student = Eagle3Student.new(recording.target, recording.taps, shared, 0, "forward-kl")
    student.head.load_state_dict({name: one.float() for name, one in tensors.items() if name not in ("d2t", "t2d")})

    model = import_module("speculators.models.eagle3.core").Eagle3DraftModel.from_pretrained(folder).float().eval()
    steps = list[torch.Tensor]()
    model.lm_head.register_forward_hook(lambda *args: steps.append(args[-1][0].clone()))
    with torch.no_grad():
        rows = batch.states_BRF[:, :-1].float()
        model(rows, batch.tokens_BR[:, 1:], torch.zeros(1, rows.shape[1], dtype=torch.long), ttt_steps=STEPS)
        for step, (logits_KD, _, at) in enumerate(student.unrolled(batch)):
            theirs_KD = steps[step][at.rows_BR[0]]
            far, most = (logits_KD - theirs_KD).abs().max(), theirs_KD.abs().max()
            print(f"step {step}: {len(logits_KD)} rows, largest difference {far:.2g} of values up to {most:.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
