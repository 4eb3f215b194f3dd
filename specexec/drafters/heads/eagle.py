"""EAGLE heads (Li et al. 2024, 2025) as a model that drafts: one decoder layer or a few, on features and tokens.

EAGLE-3, for token t_i and the target's states x[i-1] at its taps, or y of the parent's row in their place:

    u = fc [x_a ; x_b ; x_c]       (normed whole before, or each of them, where there are such norms)
    e = input_layernorm(E t_i),  w = hidden_norm(u),  r = w or u
    s = r + attention on [e ; w],  z = s + mlp(post_attention_layernorm(s)),  ordinary layers after it
    y = z, or norm(z);  logits = lm_head norm(z), of the tokens d + d2t[d]

EAGLE-1 and 2, HASS: x is the last hidden state, the first layer has no norm in front and reads fc [E t_i ; u], u = x;
y = z, logits = the target's head z.    R rows   H hidden size   F features   S tokens that the head names
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from specexec.drafters.heads.eagle_fields import FEATURES, MASK, EagleFields, own_name
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.filled import TargetSizes, beside_tables, fill, ids_of
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.heads.masks import MaskFeatures, Masks
from specexec.drafters.heads.refusal import TargetShape, unread
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Named, Ranking
from specexec.errors import BadDrafter
from specexec.model.tree_lm import TreeLM
from specexec.sizes import CHUNK


class FirstLayer(nn.Module):
    """EAGLE-3's first layer: what attends is twice as wide as what goes on. Shares the parts of an ordinary layer."""

    def __init__(self, ordinary: nn.Module, hidden: int, norm_before_residual: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = ordinary.get_submodule("self_attn"), ordinary.get_submodule("mlp")
        self.input_layernorm = ordinary.get_submodule("input_layernorm")
        self.post_attention_layernorm = ordinary.get_submodule("post_attention_layernorm")
        self.hidden_norm = _norm_like(self.input_layernorm, hidden)
        self.norm_before_residual = norm_before_residual
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = self.self_attn.get_submodule(name)
            assert isinstance(narrow, nn.Linear)
            self.self_attn.add_module(name, nn.Linear(2 * hidden, narrow.out_features, narrow.bias is not None))

    def forward(self, hidden_states: Tensor, **how: object) -> Tensor:
        """Embeddings and features side by side, [1, R, 2H]; the layer's output, [1, R, H]."""
        embedded, features = hidden_states.chunk(2, -1)
        normed = self.hidden_norm(features)
        both = torch.cat([self.input_layernorm(embedded), normed], -1)
        found = self.self_attn(hidden_states=both, **how)[0]
        found = found + (normed if self.norm_before_residual else features)
        pieces = (one + self.mlp(self.post_attention_layernorm(one)) for one in found.split(CHUNK, 1))
        return torch.cat([*pieces], 1)


class EagleHead(nn.Module):
    """The parts of a head under the names in which they are published; `model` is made of the same ones."""

    def __init__(self, fields: EagleFields, model: PreTrainedModel, names: frozenset[str], features: int) -> None:
        super().__init__()
        trunk = model.get_submodule("model")
        layers, norm = trunk.get_submodule("layers"), trunk.get_submodule("norm")
        assert isinstance(layers, nn.ModuleList)
        hidden = int(model.config.hidden_size)
        self.fc = nn.Linear(features, hidden, "fc.bias" in names)
        self.layers = layers
        if fields.generation == 3:
            layers[0] = FirstLayer(layers[0], hidden, fields.norm_before_residual)
            self.norm = norm
            if fields.norm_before_fc or "input_norm.weight" in names:
                self.input_norm = _norm_like(norm, features)
            if fields.fc_norm or "fc_norm.0.weight" in names:
                self.fc_norm = nn.ModuleList(_norm_like(norm, features // len(fields.taps)) for _ in fields.taps)
        elif "layers.0.input_layernorm.weight" not in names:
            layers[0].input_layernorm = nn.Identity()
        if "lm_head.weight" in names:
            self.lm_head = nn.Linear(hidden, fields.vocabulary, bias=False)
        for name, linear in [*self.layers.named_modules()]:
            if isinstance(linear, nn.Linear) and (f"layers.{name}.bias" in names) != (linear.bias is not None):
                owner, _, key = name.rpartition(".")
                biased = nn.Linear(linear.in_features, linear.out_features, linear.bias is None)
                self.layers.get_submodule(owner).add_module(key, biased)

    def joined(self, states_RF: Tensor) -> Tensor:
        """u of the target's states side by side, [R, H]."""
        states_RF = states_RF.to(self.fc.weight.dtype)
        if "input_norm" in self._modules:
            states_RF = self.input_norm(states_RF)
        if "fc_norm" in self._modules:
            parts = zip(self.fc_norm, states_RF.chunk(len(self.fc_norm), -1), strict=True)
            states_RF = torch.cat([norm(part) for norm, part in parts], -1)
        found_RH: Tensor = self.fc(states_RF)
        return found_RH


@dataclass(frozen=True)
class Eagle:
    """A head that is loaded, as a model that drafts; `ids` are what its rows stand for, None: 0, 1, 2, …"""

    fields: EagleFields
    lm: TreeLM
    head: EagleHead
    ids: list[int] | None
    mask_F: Tensor | None = None
    """What P-EAGLE's masks read."""

    def drafter(
        self,
        target: TreeLM,
        vocabulary: int,
        ranking: Ranking | None = None,
        never: Iterable[int] = (),
        check: SelfCheck | None = None,
        name: str = "eagle",
        window: int | None = None,
    ) -> HeadDrafter | LatticeDrafter:
        """It guesses for a target; one that is not checked reads what it is published with."""
        joined = self.head.joined if self.fields.generation == 3 else None
        states = TextStates(target, self.fields.taps, self.ids or range(self.lm.vocabulary), joined, check)
        features = HeadFeatures(self.lm, states)
        if self.mask_F is not None and self.fields.mask is not None:
            named = Named(self.lm.vocabulary, vocabulary, never, self.lm.device, self.ids)
            with torch.no_grad():
                masks = MaskFeatures(features, self.head.joined(self.mask_F))
            return LatticeDrafter(
                Masks(self.lm, self.fields.mask, self.fields.places, masks, window), named, ranking, name
            )
        return HeadDrafter(self.lm, features, vocabulary, ranking, name, never, self.ids, window)


def loaded(settings: Mapping[str, object], tensors: Mapping[str, Tensor], target: TreeLM, name: str) -> Eagle:
    """The head for this target, which may share embeddings and head with it.

    `tensors` under published names. Raises BadDrafter, by name, where it has other parts than these or other sizes.
    """
    named = ((own_name(key), one) for key, one in tensors.items())
    own = {key: one for key, one in named if key is not None}
    sizes, layers = TargetSizes.of(target), int(target.model.config.num_hidden_layers)
    shape = TargetShape(layers, sizes.hidden, len(sizes.embeddings_VH))
    fields = EagleFields.of(settings, {key: tuple(one.shape) for key, one in own.items()}, shape, name)
    refused = partial(unread, fields.kind, name)
    mask_F = own.pop(MASK, None)
    d2t_S, t2d_V = own.pop("d2t", None), own.pop("t2d", None)
    ids = None if d2t_S is None else ids_of(d2t_S, t2d_V, shape.vocabulary, refused)
    own_table = own.pop("embed_tokens.weight", None)
    table_VH = sizes.embeddings_VH
    if own_table is not None:  # looked up where the target's are
        table_VH = own_table.to(table_VH.device, sizes.dtype)
    config = _config(fields, shape.vocabulary, refused)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        head = EagleHead(fields, model, frozenset(own), int(own[FEATURES].shape[1]))
    fill(head, own, sizes, refused)
    trunk = beside_tables(model, sizes.device)
    out = head.lm_head if "lm_head" in head._modules else target.model.get_output_embeddings()
    after = head.norm if fields.generation == 3 else nn.Identity()
    trunk.add_module("norm", after if fields.norm_output else nn.Identity())  # what comes out goes to children
    model.add_module("lm_head", out if fields.norm_output else nn.Sequential(after, out))

    def mix(tokens_R: Tensor, features_RH: Tensor) -> Tensor:
        embedded_RH = embedding(tokens_R.to(table_VH.device), table_VH).to(features_RH.device)
        both_RF = torch.cat([embedded_RH, features_RH], -1)
        return both_RF if fields.generation == 3 else head.fc(both_RF)

    if mask_F is not None:
        mask_F = mask_F.flatten()[None].to(sizes.device, sizes.dtype)
    return Eagle(fields, target.alike(model.eval(), mix=mix), head, ids, mask_F)


def make(kit: DrafterKit) -> Drafter:
    """A head from a folder of its own, for this target."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    found, ids = kit.head, kit.names
    eagle = loaded(found.settings, found.tensors(), kit.target, found.name)
    check = SelfCheck(found.name, eagle.fields.readings)
    return eagle.drafter(kit.target, ids.rows, kit.ranking, ids.never, check, found.name, kit.window)


def _norm_like(norm: nn.Module, size: int) -> nn.Module:
    """One of the same class, for another width."""
    made: nn.Module = type(norm)(size, eps=norm.variance_epsilon)
    return made


def _config(fields: EagleFields, vocabulary: int, refused: Callable[[str], BadDrafter]) -> PretrainedConfig:
    """That of a model of the head's layers, as transformers makes it."""
    left_out = ("quantization_config", "auto_map", "architectures")
    given = {key: one for key, one in fields.layer.items() if key not in left_out}
    given |= {"vocab_size": vocabulary, "tie_word_embeddings": False}
    try:
        config: PretrainedConfig = type(AutoConfig.for_model(str(given["model_type"]))).from_dict(given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise refused(f"its config.json makes no sense ({error})") from error
    return config
