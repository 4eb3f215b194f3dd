"""Recorded outputs of heads by the packages that define them, for tests: `python scripts/head_references.py [NAME …]`.

mtp: a GLM-4 MoE of two layers with its own layer under shipped names; logits of that layer by transformers' MtpModel.
dflash, dflash_sliding, dflash2: heads of two layers for a target of four, by the package `dflash` 0.1.0 (pip install
--no-deps). Others by the package `speculators` 0.9.0 (scripts/with_speculators): dflash_red_hat,
dflash2_red_hat and dspark*, the same as it has them; eagle3*, EAGLE-3 heads as first published, as Red Hat and gpt-oss
have them, and EAGLE-3.1 of two Qwen3 layers; peagle, a P-EAGLE head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel, Qwen3Config
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
    torch.manual_seed(7)
    layer = AutoConfig.for_model(**_layer(kind, layers))
    layer._attn_implementation = "eager"
    config = config_of.Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=40, eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=_told("eagle3"), **fields,
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


def dflash2(folder: Path) -> None:
    """A head with convolutions and a selector, and the greedy path that it chooses."""
    torch.manual_seed(15)
    given = {"block_size": 6, "mask_token_id": 95, "target_layer_ids": [0, 2], "conv_kernel_size": 2,
             "conv_group_size": 8, "selector_rank": 8, "selector_top_k": 16}  # fmt: skip
    layer = _layer("qwen3", 2)
    config = Qwen3Config.from_dict(layer | {"num_target_layers": 4, "dflash_config": given, "dtype": "float32"})
    model = import_module("dflash.model").DFlash2DraftModel(config)
    _draw(model)
    drawn = torch.Generator().manual_seed(16)
    table, head = (torch.randn(96, 32, generator=drawn) for _ in range(2))
    text = torch.randint(0, 95, (11,), generator=drawn)
    states = torch.randn(10, 64, generator=drawn)
    block = torch.tensor([int(text[-1]), *[95] * 5])
    out = torch.nn.Linear(32, 96, bias=False)
    with torch.no_grad():
        out.weight.copy_(head)
        hidden = model(torch.arange(16)[None], noise_embedding=table[block][None], target_hidden=states[None])
        path, _, _ = model.propose(hidden[:, 1:], block[None, 0], out, 0.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    record = {"table": table, "head": head, "text": text, "states": states, "hidden": hidden[0], "path": path[0]}
    save_file({name: one.contiguous() for name, one in record.items()}, folder / "reference.safetensors")


def block(
    folder: Path,
    kind: str,
    name: str,
    kinds: tuple[str, str] = ("full_attention", "full_attention"),
    named: int = 40,
    **fields: object,
) -> None:
    """A head of `speculators`, states and tokens of a text that goes on behind a block, and the block's logits.

    Those of a sequential part are the ones that it gives where the tokens in between are the text's own.
    """
    config_of, model_of = (import_module(f"speculators.models.{kind}.{part}") for part in ("config", "core"))
    torch.manual_seed(9)
    layer = AutoConfig.for_model(
        **_layer("qwen3", 2), layer_types=[*kinds], sliding_window=5,
        use_sliding_window="sliding_attention" in kinds,
    )  # fmt: skip
    layer._attn_implementation = "eager"
    config = getattr(config_of, f"{name}SpeculatorConfig")(
        transformer_layer_config=layer, draft_vocab_size=named, aux_hidden_state_layer_ids=[1, 3], block_size=6,
        mask_token_id=95, speculators_config=_told(kind), **fields,
    )  # fmt: skip
    model = getattr(model_of, f"{name}DraftModel")(config)
    _draw(model)
    drawn = torch.Generator().manual_seed(10)
    if named < 96:
        _name_some(model.d2t, model.t2d, drawn)
    text, states = torch.randint(0, 95, (20,), generator=drawn), torch.randn(20, 64, generator=drawn)
    anchor = torch.zeros(1, 20)
    anchor[0, 10] = 1
    record = {"table": model.embed_tokens.weight, "head": model.lm_head.weight, "text": text, "states": states[:10]}
    with torch.no_grad():
        last, whole = torch.zeros(1, 20, 32), torch.zeros(1, 20, dtype=torch.long)
        hidden, logits, *_ = model._backbone_forward(states[None], text[None], anchor, last, whole, max_anchors=1)
        before = text[10:16] if config.sample_from_anchor else torch.cat([text[10:11], text[10:15]])
        if kind == "dspark":
            logits = logits + model.markov_head.block_bias(prev_token_ids=before[None], hidden_states=hidden)
        if kind == "dflash2":
            best, scores = model.candidate_selector.select(logits, hidden, before[None])
            record |= {"best": best[0], "scores": scores[0]}
    record |= {"hidden": hidden[0], "logits": logits[0]}
    _saved(model, folder, record)


def peagle(folder: Path) -> None:
    """A P-EAGLE head for 40 of 96 tokens, states of a text, and its logits of four tokens behind it.

    `speculators` computes them while it trains: from all places of a text, drawn depth by depth; here from the last
    place alone, by its own sampling of depths replaced.
    """
    core = import_module("speculators.models.peagle.core")
    config_of = import_module("speculators.models.peagle.config")
    torch.manual_seed(7)
    layer = AutoConfig.for_model(**_layer("llama", 1))
    layer._attn_implementation = "eager"
    config = config_of.PEagleSpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=40, eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        speculators_config=_told("peagle", 4), mask_token_id=95, norm_before_residual=True,
    )  # fmt: skip
    model = core.PEagleDraftModel(config)
    _draw(model)
    drawn = torch.Generator().manual_seed(8)
    _name_some(model.d2t, model.t2d, drawn)
    text, states = torch.randint(0, 95, (13,), generator=drawn), torch.randn(12, 96, generator=drawn)
    rows = torch.cat([text[1:], torch.zeros(3, dtype=torch.long)])  # the places of masks hold nothing
    features = torch.cat([states, torch.zeros(3, 96)])
    places = (
        torch.cat([torch.arange(12), torch.full((3,), 11)]),
        torch.cat([torch.zeros(12), torch.arange(1, 4)]).long(),
    )
    vars(core)["generate_cod_sample_indices"] = lambda **_: places
    vars(core)["compute_metrics"] = lambda **given: (None, {"logits": given["logits"]})
    documents = torch.zeros(1, 15, dtype=torch.long)
    with torch.no_grad():
        _, _, found = model(features[None], rows[None], documents, verifier_last_hidden_states=torch.zeros(1, 15, 32))
    _saved(model, folder, {"text": text, "states": states, "logits": found["logits"][0, 11:]})


def _layer(kind: str, layers: int) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _told(kind: str, tokens: int = 3) -> object:
    """How `speculators` says for what and how a head is used."""
    base = import_module("speculators.config")
    proposal = import_module("speculators.proposals.greedy").GreedyTokenProposalConfig(speculative_tokens=tokens)
    return base.SpeculatorsConfig(
        algorithm=kind,
        proposal_methods=[proposal],
        default_proposal_method="greedy",
        verifier=base.VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )


def _draw(model: PreTrainedModel) -> None:
    """Every weight, rounded to bfloat16, so that it is stored in half the space."""
    redraw(model.eval(), 9)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(one.bfloat16())


def _name_some(d2t: torch.Tensor, t2d: torch.Tensor, drawn: torch.Generator) -> None:
    """As many of a target's tokens as a head names, drawn."""
    kept = torch.randperm(96, generator=drawn)[: len(d2t)].sort().values
    d2t.copy_(kept - torch.arange(len(d2t)))
    t2d.copy_(torch.isin(torch.arange(96), kept))


def _saved(model: PreTrainedModel, folder: Path, record: dict[str, torch.Tensor]) -> None:
    record = {name: one.detach().clone().contiguous() for name, one in record.items()}
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.py").unlink(missing_ok=True)  # a copy of the package's own
    save_file(record, folder / "reference.safetensors")


MAKERS: dict[str, Callable[[Path], None]] = {
    "mtp": mtp,
    "dflash": dflash,
    "dflash_sliding": dflash_sliding,
    "dflash2": dflash2,
    "dflash_red_hat": partial(block, kind="dflash", name="DFlash", kinds=("sliding_attention", "full_attention")),
    "dspark": partial(block, kind="dspark", name="DSpark", markov_rank=8),
    "dspark_gated": partial(block, kind="dspark", name="DSpark", markov_rank=8, markov_head_type="gated", named=96),
    "dspark_rnn": partial(
        block, kind="dspark", name="DSpark", markov_rank=8, markov_head_type="rnn", sample_from_anchor=False
    ),
    "dflash2_red_hat": partial(
        block,
        kind="dflash2",
        name="DFlash2",
        kinds=("sliding_attention", "full_attention"),
        named=96,
        conv_kernel_size=2,
        conv_group_size=8,
        selector_rank=8,
        selector_top_k=16,
    ),
    "peagle": peagle,
    "eagle3": eagle3,
    "eagle3_redhat": partial(eagle3, norm_before_residual=True),
    "eagle3_gptoss": partial(eagle3, norm_before_fc=True),
    "eagle3_1": partial(eagle3, kind="qwen3", layers=2, fc_norm=True, norm_output=True),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        MAKERS[name](FOLDER / name)
