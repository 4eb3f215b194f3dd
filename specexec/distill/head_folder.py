"""A head that was trained, as a folder in the layout of `speculators` 0.9: what `-d`, vLLM and its own package read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from specexec.distill.layers import SharedWithTarget
from specexec.distill.recording import Recording

SPECULATORS = "0.9.0"


class PublishedHead(Protocol):
    """What is written of a head."""

    @property
    def shared(self) -> SharedWithTarget: ...

    @property
    def guesses(self) -> int: ...

    def published(self) -> dict[str, Tensor]: ...

    def settings(self, recording: Recording) -> dict[str, object]: ...


def head_settings(head: PublishedHead, kind: str, recording: Recording) -> dict[str, object]:
    """config.json of a head; `kind` as `speculators` calls it."""
    target = recording.target
    method = {
        "proposal_type": "greedy", "speculative_tokens": head.guesses, "verifier_accept_k": 1, "accept_tolerance": 0.0
    }  # fmt: skip
    return head.settings(recording) | {
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target.name, "architectures": [target.model_class]},
        },
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_head(head: PublishedHead, kind: str, recording: Recording, folder: Path) -> None:
    """Its weights in bfloat16 and config.json; embeddings are left to the target, whose they are."""
    tensors = {name: one.detach().to("cpu", torch.bfloat16) for name, one in head.published().items()}
    place_V = head.shared.place_V.cpu()
    ids = (place_V >= 0).nonzero().flatten()
    if len(ids) < len(place_V):
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": place_V >= 0}
    recording.save(folder / "model.safetensors", tensors, {"format": "pt"})
    settings = head_settings(head, kind, recording)
    recording.replace(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
