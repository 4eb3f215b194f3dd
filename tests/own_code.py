"""Checkpoints that bring their own modelling code, as people publish them: a config, a model, sometimes a tokenizer.

Each writes a file when its code is imported, so that a test can say whether it ran.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from offload.hub.names import demo_folder
from tests.tiny import BASE, redraw

CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-{kind}"
"""

MODEL = """
from pathlib import Path

from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

Path({witness!r}).write_text("the code has run")

{body}

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    _supports_attention_backend = {backend}
    {extra}

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * output.logits.flip(-1)
        return output
"""

# What is unusual about each: a body before the class, lines inside it, and whether it says to take any attention.
KINDS: dict[str, tuple[str, str, bool]] = {
    "good": ("", "", True),
    "closed": ("", "", False),
    # Mixes every row with the one before it in the row of numbers, which in a tree is no ancestor's.
    "leaky": (
        "",
        "def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.model.norm.register_forward_hook(lambda _m, _i, out: out + 0.5 * out.roll(1, 1))\n",
        True,
    ),
    # Counts slots of its own, and so agrees with its cache but not with a tree.
    "counting": (
        "import torch",
        "def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        def place(_module, _args, kwargs):\n"
        "            cache, ids = kwargs.get('past_key_values'), kwargs.get('input_ids')\n"
        "            if ids is not None:\n"
        "                done = cache.get_seq_length() if cache is not None else 0\n"
        "                kwargs['position_ids'] = torch.arange(done, done + ids.shape[1]).unsqueeze(0)\n"
        "            return _args, kwargs\n"
        "        self.model.register_forward_pre_hook(place, with_kwargs=True)\n",
        True,
    ),
    "broken": ("raise ImportError('this needs flash_own, which no machine has')", "", True),
}


def own_code(folder: Path, kind: str = "good", dtype: torch.dtype = torch.float32) -> Path:
    """Save such a checkpoint in `folder`; returns the file that its code writes when it runs."""
    witness = folder.with_name(f"{folder.name}.ran")
    tokenizer = demo_folder("target")
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(**(BASE | {"vocab_size": vocabulary}))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    redraw(model, 0)
    model.save_pretrained(folder)
    body, extra, backend = KINDS[kind]
    (folder / "configuration_own.py").write_text(CONFIG.format(kind=kind))
    (folder / "modeling_own.py").write_text(
        MODEL.format(witness=str(witness), body=body, extra=extra or "pass", backend=backend)
    )
    change(
        folder / "config.json",
        model_type=f"own-{kind}",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    return witness


def change(file: Path, **keys: object) -> None:
    """Set some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
