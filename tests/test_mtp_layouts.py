"""Layers that guess further ahead, as publishers store them: each computes what its equations say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.mtp import mtp_layout, mtp_names
from offload.model.mtp_layer import load_mtp_layer
from offload.packs.pack import pack, plan
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.mtp import mtp_lm
from specexec.drafters.none import NoDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import redraw
from tests.writing import prompt, write
from tests.zoo import tiny_of

MOST = 90  # ids of prompts


@dataclass(frozen=True)
class Layout:
    """A target, what its layer is like among its own, and what its parts are called."""

    model_type: str
    kinds: dict[str, str]
    layer: str
    enorm: str
    hnorm: str
    projection: str
    norm: str | None
    renamed: dict[str, str] = field(default_factory=dict)
    hidden_first: bool = False
    settings: dict[str, list[str]] = field(default_factory=dict)


LAYOUTS = {
    "exaone_moe": Layout(
        "exaone_moe", {"layer_types": "sliding_attention", "mlp_layer_types": "dense"}, "mtp.layers.0.",
        "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm",
        settings={"mtp_layer_types": ["sliding_attention"]},
    ),
    "mimo_v2": Layout(
        "mimo_v2_flash", {"layer_types": "sliding_attention", "mlp_layer_types": "dense"}, "model.mtp.layers.0.",
        "model.mtp.layers.0.enorm", "model.mtp.layers.0.hnorm", "model.mtp.layers.0.eh_proj",
        "model.mtp.layers.0.final_layernorm", {"post_attention_layernorm": "pre_mlp_layernorm"},
    ),
    "mimo": Layout(
        "qwen2", {"layer_types": "full_attention"}, "model.mtp_layers.0.", "model.mtp_layers.0.token_layernorm",
        "model.mtp_layers.0.hidden_layernorm", "model.mtp_layers.0.input_proj", "model.mtp_layers.0.final_layernorm",
        hidden_first=True,
    ),
    "ernie": Layout(
        "ernie4_5_moe", {}, "model.mtp_block.0.", "model.mtp_emb_norm.0", "model.mtp_hidden_norm.0",
        "model.mtp_linear_proj.0", None,
    ),
}  # fmt: skip


class Case:
    """A small target of one layout, its layer drawn, and the layer alone as transformers builds it."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        def also(config: PreTrainedConfig) -> None:
            for name, value in layout.settings.items():
                setattr(config, name, value)

        self.layout, self.model = layout, tiny_of(layout.model_type, folder, change=also)
        self.longer = self._longer()
        hidden, drawn = int(self.model.config.hidden_size), torch.Generator().manual_seed(3)
        own = {}
        for name, one in self.longer.model.layers[-1].state_dict().items():
            for ours, theirs in layout.renamed.items():
                name = name.replace(ours, theirs)
            own[layout.layer + name] = one
        for name in (layout.enorm, layout.hnorm, layout.norm):
            if name is not None:
                own[f"{name}.weight"] = 1.0 + 0.1 * torch.randn(hidden, generator=drawn)
        own[f"{layout.projection}.weight"] = torch.randn(hidden, 2 * hidden, generator=drawn) / (2 * hidden) ** 0.5
        self.own = {name: one.clone().contiguous() for name, one in own.items()}
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | self.own, folder / "model.safetensors", metadata={"format": "pt"})
        self.target = TreeLM(offload.load(folder, "none", dtype="f32"))
        brought = load_mtp_layer(open_folder(folder), torch.device("cpu"), torch.float32)
        self.lm = mtp_lm(self.target, brought.layer, brought.config, brought.hidden_first)

    def _longer(self) -> PreTrainedModel:
        """A model of the same kind whose last layer is like the one that guesses."""
        config = copy.deepcopy(self.model.config)
        count = int(config.num_hidden_layers)
        for name, value in [*vars(config).items()]:
            if isinstance(value, list) and len(value) == count:
                setattr(config, name, [*value, self.layout.kinds.get(name, value[-1])])
        config.num_hidden_layers = count + 1
        make: Callable[..., PreTrainedModel] = getattr(type(self.model), "_from_config")  # noqa: B009
        model = make(config, dtype=torch.float32, attn_implementation="eager")
        redraw(model, 9)
        return model.eval()

    def wanted(self, text: list[int]) -> tuple[Tensor, Tensor]:
        """The target's last hidden states, and logits of the layer, by transformers' own modules."""
        layout, model, longer = self.layout, self.model, self.longer
        norm_of = type(model.model.norm)

        def normed(name: str, rows: Tensor) -> Tensor:
            one = norm_of(rows.shape[-1], eps=model.model.norm.variance_epsilon)
            one.weight.data = self.own[f"{name}.weight"]
            found: Tensor = one(rows)
            return found

        model.set_attn_implementation("eager")
        with torch.no_grad():
            hidden = model.model(torch.tensor([text[:-1]])).last_hidden_state
            both = [
                normed(layout.enorm, model.model.embed_tokens(torch.tensor([text[1:]]))),
                normed(layout.hnorm, hidden),
            ]
            if layout.hidden_first:
                both.reverse()
            mixed = torch.cat(both, -1) @ self.own[f"{layout.projection}.weight"].T
            captured = list[Tensor]()
            layer = longer.model.layers[-1]
            for earlier in longer.model.layers[:-1]:
                earlier.forward = lambda hidden_states, *_, **__: hidden_states
            layer.register_forward_hook(
                lambda *args: captured.append(args[-1][0] if isinstance(args[-1], tuple) else args[-1])
            )
            longer.model(inputs_embeds=mixed)
            out = captured[0] if layout.norm is None else normed(layout.norm, captured[0])
            return hidden[0], model.lm_head(out).reshape(len(text) - 1, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_logits_are_what_its_equations_say(name: str, tmp_path: Path) -> None:
    case, text = Case(LAYOUTS[name], tmp_path / "model"), prompt(23, 3, MOST)
    hidden_RH, wanted_RV = case.wanted(text)
    (found_RH,) = case.lm.forward([replace(Rows.text(KVCache(), text[1:]), features_RF=hidden_RH)])
    assert (case.lm.head(found_RH) - wanted_RV).abs().max() < 2e-4
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=12)
    vocabulary = case.target.vocabulary
    plain = write(case.target, NoDrafter(), [prompt(9, 1, MOST)], sampling, vocabulary=vocabulary)
    features = HeadFeatures(case.lm, TextStates(case.target, [LAST], range(vocabulary)))
    drafter = HeadDrafter(case.lm, features, vocabulary)
    drafted = write(case.target, drafter, [prompt(9, 1, MOST)], sampling, 12, vocabulary=vocabulary)
    assert drafted[0].answer == plain[0].answer
    folder = open_folder(tmp_path / "model")
    assert mtp_names(folder).keys() == case.own.keys()
    assert mtp_layout(folder).hidden_first == LAYOUTS[name].hidden_first
    pack(plan(folder, "none"), tmp_path / "packed")
    assert open_folder(tmp_path / "packed").mtp.keys() == case.own.keys()
    held_B = sum(one.nbytes for one in case.own.values())
    assert held_B <= offload.mtp_B(folder, 4) <= held_B + 64 * 40
