"""Recorded outputs of heads by the packages that define them, for tests: `python scripts/head_references.py [NAME …]`.

mtp: a GLM-4 MoE of two layers with its own layer under shipped names; logits of that layer by transformers' MtpModel.
dflash, dflash_sliding: heads of two layers for a target of four, by the package `dflash` 0.1.0 (pip install --no-deps).
eagle3 and eagle3_*: EAGLE-3 heads by the package `speculators` 0.9.0 (pip install --no-deps, with hs-connectors 0.9.0,
loguru and pydantic-settings): as first published, as Red Hat and gpt-oss have them, and EAGLE-3.1 of two Qwen3 layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen3Config
from transformers.modeling_layers import MtpModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.mtp_models import as_transformers_loads, random_model
from tests.tiny import redraw

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


def dflash(folder: Path, kinds: tuple[str, str] = ("full_attention", "full_attention")) -> None:
    """A head, embeddings and head of a target, states of a text and what its block is filled with."""
    torch.manual_seed(5)
    config = Qwen3Config.from_dict(
        {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
            "layer_types": [*kinds], "use_sliding_window": "sliding_attention" in kinds, "sliding_window": 5,
            "num_target_layers": 4, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
            "dflash_config": {"block_size": 6, "mask_token_id": 95, "target_layer_ids": [0, 2]},
        }
    )  # fmt: skip
    model = import_module("dflash.model").DFlashDraftModel(config).eval()
    redraw(model, 5)
    model.save_pretrained(folder)
    drawn = torch.Generator().manual_seed(6)
    table, head = (torch.randn(96, 32, generator=drawn) for _ in range(2))
    text = torch.randint(0, 95, (11,), generator=drawn)
    states = torch.randn(10, 64, generator=drawn)
    block = torch.tensor([int(text[-1]), *[95] * 5])
    with torch.no_grad():
        hidden = model(torch.arange(16)[None], noise_embedding=table[block][None], target_hidden=states[None])[0]
    record = {"table": table, "head": head, "text": text, "states": states, "hidden": hidden[1:]}
    record["logits"] = hidden[1:] @ head.T
    save_file({name: one.contiguous() for name, one in record.items()}, folder / "reference.safetensors")


def dflash_sliding(folder: Path) -> None:
    """The same, one layer with a window."""
    dflash(folder, ("sliding_attention", "full_attention"))


def eagle3(folder: Path, kind: str = "llama", layers: int = 1, **fields: bool) -> None:
    """A head for 40 of 96 tokens, states of a text, and its logits in three steps from every place of the text.

    Step k of row i: the token k places further, its features the output of the step before; text before row i, and own
    steps, are attended to. Weights are rounded to bfloat16, so that they are stored in half the space.
    """
    config_of, model_of = (import_module(f"speculators.models.eagle3.{name}") for name in ("config", "core"))
    base = import_module("speculators.config")
    torch.manual_seed(7)
    layer = AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=32, intermediate_size=48, head_dim=8, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    layer._attn_implementation = "eager"
    proposal = import_module("speculators.proposals.greedy").GreedyTokenProposalConfig(speculative_tokens=3)
    told = base.SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[proposal],
        default_proposal_method="greedy",
        verifier=base.VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    config = config_of.Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=40, eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=told, **fields,
    )  # fmt: skip
    model = model_of.Eagle3DraftModel(config).eval()
    redraw(model, 7)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(one.bfloat16())
    drawn = torch.Generator().manual_seed(8)
    kept = torch.randperm(96, generator=drawn)[:40].sort().values
    model.d2t.copy_(kept - torch.arange(40))
    model.t2d.copy_(torch.isin(torch.arange(96), kept))
    text = torch.randint(0, 96, (13,), generator=drawn)
    states = torch.randn(12, 96, generator=drawn)
    steps = list[torch.Tensor]()
    model.lm_head.register_forward_hook(lambda *args: steps.append(args[-1][0].clone()))
    with torch.no_grad():
        model(states[None], text[None, 1:], torch.zeros(1, 12, dtype=torch.long))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.py").unlink()  # a copy of the package's own
    record = {"text": text, "states": states} | {f"logits_{step}": one for step, one in enumerate(steps)}
    save_file({name: one.contiguous() for name, one in record.items()}, folder / "reference.safetensors")


MAKERS: dict[str, Callable[[Path], None]] = {
    "mtp": mtp,
    "dflash": dflash,
    "dflash_sliding": dflash_sliding,
    "eagle3": eagle3,
    "eagle3_redhat": partial(eagle3, norm_before_residual=True),
    "eagle3_gptoss": partial(eagle3, norm_before_fc=True),
    "eagle3_1": partial(eagle3, kind="qwen3", layers=2, fc_norm=True, norm_output=True),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        MAKERS[name](FOLDER / name)
