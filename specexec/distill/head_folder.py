"""A head that was trained, as a folder in the layout of `speculators` 0.9: what `-d`, vLLM and its own package read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specexec.distill.eagle3 import Eagle3Student, layer_settings
from specexec.distill.recording import Recording, replace_file, save

SPECULATORS = "0.9.0"


def eagle3_settings(recording: Recording, names: int, steps: int) -> dict[str, object]:
    """config.json of an EAGLE-3 head that names so many tokens and was trained over so many steps."""
    target = recording.target
    method = {"proposal_type": "greedy", "speculative_tokens": steps, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target.name, "architectures": [target.model_class]},
        },
        "transformer_layer_config": layer_settings(target),
        "draft_vocab_size": names,
        "eagle_aux_hidden_state_layer_ids": [*recording.taps],
        "target_hidden_size": None,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_eagle3(student: Eagle3Student, recording: Recording, folder: Path) -> None:
    """Its weights in bfloat16 and config.json; embeddings are left to the target, whose they are."""
    state: Mapping[str, Tensor] = student.head.state_dict()
    tensors = {name: one.detach().to("cpu", torch.bfloat16) for name, one in state.items()}
    place_V = student.place_V.cpu()
    ids = (place_V >= 0).nonzero().flatten()
    if len(ids) < len(place_V):
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": place_V >= 0}
    save(folder / "model.safetensors", tensors, {"format": "pt"})
    settings = eagle3_settings(recording, len(ids), student.steps)
    replace_file(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
