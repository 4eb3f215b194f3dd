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
from torch.nn.functional import rms_norm
from transformers import DeepseekV3Config, DeepseekV3Model, PreTrainedConfig, PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.mtp import mtp_layout, mtp_names
from offload.model.mtp_layer import load_mtp_layer
from offload.packs.pack import pack, plan
from specexec.compose.head_folders import check_heads
from specexec.drafters.heads.features import HeadFeatures
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.mtp import mtp_lm, read_states
from specexec.drafters.none import NoDrafter
from specexec.drafters.registry import DrafterChoice
from specexec.errors import BadDrafter, UnsupportedArchitecture
from specexec.model.cache import KVCache
from specexec.model.submodel import partial_config
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import redraw, tiny
from tests.writing import prompt, write
from tests.zoo import tiny_of

MOST = 90  # ids of prompts


@dataclass(frozen=True)
class Layout:
    """A target, what its layers of a step are like among its own, and what their parts are called."""

    model_type: str
    kinds: dict[str, list[str]]
    layers: tuple[str, ...]
    enorm: str
    hnorm: str
    projection: str
    norm: str | None
    renamed: dict[str, str] = field(default_factory=dict)
    hidden_first: bool = False
    before_norm: bool = False
    own_head: str | None = None
    settings: dict[str, object] = field(default_factory=dict)


LAYOUTS = {
    "exaone_moe": Layout(
        "exaone_moe", {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]}, ("mtp.layers.0.",),
        "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm",
        settings={"mtp_layer_types": ["sliding_attention"]},
    ),
    "mimo_v2": Layout(
        "mimo_v2_flash", {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
        ("model.mtp.layers.0.",),
        "model.mtp.layers.0.enorm", "model.mtp.layers.0.hnorm", "model.mtp.layers.0.eh_proj",
        "model.mtp.layers.0.final_layernorm", {"post_attention_layernorm": "pre_mlp_layernorm"},
    ),
    "mimo": Layout(
        "qwen2", {"layer_types": ["full_attention"]}, ("model.mtp_layers.0.",), "model.mtp_layers.0.token_layernorm",
        "model.mtp_layers.0.hidden_layernorm", "model.mtp_layers.0.input_proj", "model.mtp_layers.0.final_layernorm",
        hidden_first=True,
    ),
    "ernie": Layout(
        "ernie4_5_moe", {}, ("model.mtp_block.0.",), "model.mtp_emb_norm.0", "model.mtp_hidden_norm.0",
        "model.mtp_linear_proj.0", None,
    ),
    "mellum": Layout(
        "mellum", {"layer_types": ["sliding_attention"], "mlp_layer_types": ["sparse"]}, ("mtp.layers.0.",),
        "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm",
        settings={
            "num_nextn_predict_layers": 1, "layer_types": ["full_attention", "sliding_attention"] * 2,
            "mtp_layer_types": ["sliding_attention"], "mtp_mlp_layer_types": ["sparse"],
        },
    ),
    "nemotron_h": Layout(
        "nemotron_h", {"layers_block_type": ["full_attention", "moe"]}, ("mtp.layers.0.", "mtp.layers.1."),
        "mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.0.eh_proj", "mtp.layers.1.final_layernorm",
        settings={"moe_shared_expert_intermediate_size": 64},
    ),
    "step": Layout(
        "step3p7", {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]}, ("model.layers.4.",),
        "model.layers.4.enorm", "model.layers.4.hnorm", "model.layers.4.eh_proj",
        "model.layers.4.transformer.shared_head.norm", before_norm=True,
        own_head="model.layers.4.transformer.shared_head.output",
        settings={
            "num_nextn_predict_layers": 1, "layer_types": ["full_attention", "sliding_attention"] * 2,
            "mtp_layer_types": ["sliding_attention"], "mtp_mlp_layer_types": ["dense"],
            "num_sliding_attention_heads": 6, "share_expert_dim": 48,
            "per_layer_config": {1: {"num_attention_heads": 6}, 3: {"num_attention_heads": 6}},
            "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.5, 0.0],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
}  # fmt: skip


class Case:
    """A small target of one layout, its layers drawn, and the layers alone as transformers builds them."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        def also(config: PreTrainedConfig) -> None:
            for name, value in layout.settings.items():
                setattr(config.get_text_config(), name, value)

        self.layout, self.model = layout, tiny_of(layout.model_type, folder, change=also)
        config = self.model.config.get_text_config()
        self.longer, count = self._longer(), int(config.num_hidden_layers)
        hidden, drawn = int(config.hidden_size), torch.Generator().manual_seed(3)
        self.longer.save_pretrained(folder.with_name("longer"))
        own = {}
        for name, one in load_file(folder.with_name("longer") / "model.safetensors").items():
            for ours, theirs in layout.renamed.items():
                name = name.replace(ours, theirs)
            for at, start in enumerate(layout.layers):
                _, found, rest = name.partition(f".layers.{count + at}.")
                if found:
                    own[start + rest] = one
        for norm in (layout.enorm, layout.hnorm, layout.norm):
            if norm is not None:
                own[f"{norm}.weight"] = 1.0 + 0.1 * torch.randn(hidden, generator=drawn)
        own[f"{layout.projection}.weight"] = torch.randn(hidden, 2 * hidden, generator=drawn) / (2 * hidden) ** 0.5
        if layout.own_head is not None:
            own[f"{layout.own_head}.weight"] = torch.randn(int(config.vocab_size), hidden, generator=drawn)
        self.own = {name: one.clone().contiguous() for name, one in own.items()}
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | self.own, folder / "model.safetensors", metadata={"format": "pt"})
        self.target = TreeLM(offload.load(folder, "none", dtype="f32"))
        self.brought = load_mtp_layer(open_folder(folder), torch.device("cpu"), torch.float32)
        self.lm = mtp_lm(self.target, self.brought)

    def _longer(self) -> PreTrainedModel:
        """A model of the same kind whose last layers are like those that guess."""
        whole = copy.deepcopy(self.model.config)
        config, more = whole.get_text_config(), len(self.layout.layers)
        count = int(config.num_hidden_layers)
        for name, value in [*vars(config).items()]:
            if isinstance(value, list) and len(value) == count:
                setattr(config, name, [*value, *self.layout.kinds.get(name, value[-1:] * more)])
        config.num_hidden_layers = count + more
        if config.is_heterogeneous:
            with_window: dict[int | str, dict[str, object]] = {at: {"num_attention_heads": 6} for at in (1, 3, count)}
            config.per_layer_config = with_window
        make: Callable[..., PreTrainedModel] = getattr(type(self.model), "_from_config")  # noqa: B009
        model = make(whole, dtype=torch.float32, attn_implementation="eager")
        redraw(model, 9)
        return model.eval()

    def wanted(self, text: list[int]) -> tuple[Tensor, Tensor]:
        """What the layer reads of the target's texts, and its logits, by transformers' own modules."""
        layout, model, longer = self.layout, self.model, self.longer.get_decoder()
        trunk = model.get_decoder()
        norm = trunk._modules.get("norm", trunk._modules.get("norm_f"))
        assert norm is not None
        eps = next(value for name, value in vars(norm).items() if name in ("variance_epsilon", "eps"))

        def normed(name: str, rows: Tensor) -> Tensor:
            one = type(norm)(rows.shape[-1], eps=eps)
            one.weight.data = self.own[f"{name}.weight"]
            found: Tensor = one(rows)
            return found

        model.set_attn_implementation("eager")
        flowed = list[Tensor]()
        with torch.no_grad():
            norm.register_forward_hook(lambda _, given, __: flowed.append(given[0]))
            hidden = trunk(torch.tensor([text[:-1]])).last_hidden_state
            hidden = flowed[0] if layout.before_norm else hidden
            both = [
                normed(layout.enorm, model.get_input_embeddings()(torch.tensor([text[1:]]))),
                normed(layout.hnorm, hidden),
            ]
            if layout.hidden_first:
                both.reverse()
            mixed = torch.cat(both, -1) @ self.own[f"{layout.projection}.weight"].T
            captured = list[Tensor]()
            for earlier in longer.layers[: -len(layout.layers)]:
                earlier.forward = lambda hidden_states, *_, **__: hidden_states
            longer.layers[-1].register_forward_hook(
                lambda *args: captured.append(args[-1][0] if isinstance(args[-1], tuple) else args[-1])
            )
            longer(inputs_embeds=mixed)
            out = captured[0] if layout.norm is None else normed(layout.norm, captured[0])
            head = model.get_output_embeddings().weight
            head = head if layout.own_head is None else self.own[f"{layout.own_head}.weight"]
            return hidden[0], (out @ head.T).reshape(len(text) - 1, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_logits_are_what_its_equations_say(name: str, tmp_path: Path) -> None:
    case, text = Case(LAYOUTS[name], tmp_path / "model"), prompt(23, 3, MOST)
    hidden_RH, wanted_RV = case.wanted(text)
    (found_RH,) = case.lm.forward([replace(Rows.text(KVCache(), text[1:]), features_RF=hidden_RH)])
    assert (case.lm.head(found_RH) - wanted_RV).abs().max() < 2e-4
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=12)
    vocabulary = case.target.vocabulary
    plain = write(case.target, NoDrafter(), [prompt(9, 1, MOST)], sampling, vocabulary=vocabulary)
    drafter = HeadDrafter(case.lm, HeadFeatures(case.lm, read_states(case.target, case.brought)), vocabulary)
    drafted = write(case.target, drafter, [prompt(9, 1, MOST)], sampling, 12, vocabulary=vocabulary)
    assert drafted[0].answer == plain[0].answer
    folder = open_folder(tmp_path / "model")
    assert mtp_names(folder).keys() == case.own.keys()
    assert mtp_layout(folder).hidden_first == LAYOUTS[name].hidden_first
    pack(plan(folder, "none"), tmp_path / "packed")
    assert open_folder(tmp_path / "packed").mtp.keys() == case.own.keys()
    held_B = sum(one.nbytes for one in case.own.values())
    assert held_B <= offload.mtp_B(folder, 4) <= held_B + 64 * 40


def test_longcats_layer_is_one_of_deepseek_whose_inner_norms_are_scaled(tmp_path: Path) -> None:
    """As vLLM and SGLang compute it: a dense layer that attends once, beside a model whose layers attend twice."""
    folder, text = tmp_path / "model", prompt(23, 3, MOST)
    model = tiny_of("longcat_flash", folder)
    ours, hidden = model.config, int(model.config.hidden_size)
    same = (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "max_position_embeddings",
        "rope_parameters",
    )  # fmt: skip
    config = DeepseekV3Config(
        **{name: getattr(ours, name) for name in same}, intermediate_size=ours.ffn_hidden_size,
        num_hidden_layers=1, first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    layer = DeepseekV3Model(config).eval()
    layer.set_attn_implementation("eager")
    redraw(layer, 9)
    drawn = torch.Generator().manual_seed(3)
    around = {name: 1.0 + 0.1 * torch.randn(hidden, generator=drawn) for name in ("enorm.m", "hnorm.m")}
    around["eh_proj"] = torch.randn(hidden, 2 * hidden, generator=drawn) / (2 * hidden) ** 0.5
    start = "model.mtp.layers.0."
    own = {f"{start}{name}.weight": one for name, one in around.items()}
    for name, one in layer.state_dict().items():
        name = name.replace("layers.0.mlp.", "layers.0.transformer_layer.mlp.")
        own[f"model.mtp.{name}"] = one.clone()
    save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for norm, rank in (("q_a_layernorm", ours.q_lora_rank), ("kv_a_layernorm", ours.kv_lora_rank)):
            layer.get_parameter(f"layers.0.self_attn.{norm}.weight").mul_((hidden / rank) ** 0.5)
        hidden_RH = model.model(torch.tensor([text[:-1]])).last_hidden_state[0]
        both = zip(
            (model.get_input_embeddings()(torch.tensor(text[1:])), hidden_RH), ("enorm.m", "hnorm.m"), strict=True
        )
        normed = [rms_norm(rows, (hidden,), around[name], ours.rms_norm_eps) for rows, name in both]
        mixed_RH = torch.cat(normed, -1) @ around["eh_proj"].T
        wanted_RV = layer(inputs_embeds=mixed_RH[None]).last_hidden_state[0] @ model.lm_head.weight.T
    target = TreeLM(offload.load(folder, "none", dtype="f32"))
    brought = load_mtp_layer(open_folder(folder), torch.device("cpu"), torch.float32)
    lm = mtp_lm(target, brought)
    (found_RH,) = lm.forward([replace(Rows.text(KVCache(), text[1:]), features_RF=hidden_RH)])
    assert (lm.head(found_RH) - wanted_RV).abs().max() < 2e-4
    sampling, vocabulary = SamplingParams(temperature=0.8, seed=1, max_tokens=12), target.vocabulary
    drafter = HeadDrafter(lm, HeadFeatures(lm, read_states(target, brought)), vocabulary)
    plain, drafted = (
        write(target, one, [prompt(9, 1, MOST)], sampling, budget, vocabulary=vocabulary)[0].answer
        for one, budget in ((NoDrafter(), 0), (drafter, 12))
    )
    assert drafted == plain
    pack(plan(open_folder(folder), "none"), tmp_path / "packed")
    assert open_folder(tmp_path / "packed").mtp.keys() == own.keys()
    with pytest.raises(UnsupportedArchitecture, match="each attends twice"):
        partial_config(ours, [0, 1])


def test_a_layer_that_is_stored_in_another_way_is_refused_by_name(tmp_path: Path) -> None:
    tiny("qwen2", tmp_path)
    start, one = "mtp.layers.0.", torch.zeros(4)
    names = ("input_proj", "embed_norm", "hidden_norm", "chain_norm", "transformer_block.self_attn.o_proj")
    own = {f"{start}{name}.weight": one.clone() for name in names}
    save_file(load_file(tmp_path / "model.safetensors") | own, tmp_path / "model.safetensors", {"format": "pt"})
    folder = open_folder(tmp_path)
    assert folder.mtp.keys() == own.keys()
    assert not mtp_names(folder)
    with pytest.raises(BadDrafter, match="stored in a way that is not read yet"):
        check_heads(DrafterChoice(("mtp",)), folder, ())
