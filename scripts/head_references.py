"""Recorded outputs of heads by the packages that define them, for tests: `python scripts/head_references.py mtp`.

mtp: a GLM-4 MoE of two layers with its own layer under shipped names; logits of that layer by transformers' MtpModel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.modeling_layers import MtpModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.mtp_models import as_transformers_loads, random_model

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "heads"


def mtp(folder: Path) -> None:
    """Text, the target's last hidden states, its next token, and what the layer says about the one after that."""
    random_model("glm", folder)
    model = as_transformers_loads(folder)
    text = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        hidden = model.model(text).last_hidden_state
        following = model.lm_head(hidden[:, -1:]).argmax(-1)
        rows = torch.cat([text[:, 1:], following], 1)
        layer = MtpModel.from_pretrained(model)
        positions = torch.arange(1, rows.shape[1] + 1)[None]
        _, logits, _ = layer(rows, hidden, None, positions, None)
    record = {"text": text, "hidden": hidden, "next": following, "mtp_logits": logits}
    save_file({name: one.contiguous() for name, one in record.items()}, folder / "reference.safetensors")


MAKERS = {"mtp": mtp}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        MAKERS[name](FOLDER / name)
