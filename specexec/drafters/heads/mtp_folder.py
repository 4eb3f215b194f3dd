"""An MTP layer from a folder of its own (`speculators`): Qwen3's, for a target of any kind. Knows no tree and no file.

z_i = layer(input_proj [token_layernorm(E t_i) ; hidden_layernorm(h_{i-1})]),  h_i = final_layernorm(z_i),  logits
head(h_i); h_{i-1} is what flows out of the target's last layer, before its norm, or h of the parent.
R rows   H hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.filled import TargetSizes, beside_tables, fill
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.mtp_fields import KIND, check, layer_config, own_name
from specexec.drafters.heads.refusal import TargetShape, unread
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.model.taps import LAST
from specexec.model.tree_lm import TreeLM


class MtpHead(nn.Module):
    """The layer of `model` by the names in mtp_fields.py, and what lies around it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        trunk = model.get_submodule("model")
        layers, norm = trunk.get_submodule("layers"), trunk.get_submodule("norm")
        assert isinstance(layers, nn.ModuleList)
        hidden, eps = int(model.config.hidden_size), norm.variance_epsilon
        self.layers = layers
        for name in ("hidden_layernorm", "token_layernorm", "final_layernorm"):
            layers[0].add_module(name, type(norm)(hidden, eps=eps))
        layers[0].add_module("input_proj", nn.Linear(2 * hidden, hidden, bias=False))

    def mixed(self, embedded_RH: Tensor, hidden_RH: Tensor) -> Tensor:
        """What goes into the layer."""
        part = self.layers[0].get_submodule
        both = part("token_layernorm")(embedded_RH), part("hidden_layernorm")(hidden_RH)
        found_RH: Tensor = part("input_proj")(torch.cat(both, -1))
        return found_RH


def loaded(settings: Mapping[str, object], tensors: Mapping[str, Tensor], target: TreeLM, name: str) -> TreeLM:
    """A model of this one layer that shares the target's embeddings and head. Raises BadDrafter for other sizes."""
    named = ((own_name(key), one) for key, one in tensors.items())
    own = {key: one for key, one in named if key is not None}
    sizes, refused = TargetSizes.of(target), partial(unread, KIND, name)
    check(settings, own, TargetShape(len(target.kinds), sizes.hidden, len(sizes.embeddings_VH)), name)
    try:
        config = Qwen3Config.from_dict(layer_config(settings) | {"tie_word_embeddings": False})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise refused(f"its config.json makes no sense ({error})") from error
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        head = MtpHead(model)
    fill(head, own, sizes, refused)
    trunk = beside_tables(model, sizes.device)
    trunk.add_module("norm", head.layers[0].get_submodule("final_layernorm"))
    model.add_module("lm_head", target.model.get_output_embeddings())
    table_VH = sizes.embeddings_VH

    def mix(tokens_R: Tensor, hidden_RH: Tensor) -> Tensor:
        return head.mixed(embedding(tokens_R.to(table_VH.device), table_VH).to(hidden_RH.device), hidden_RH)

    return target.alike(model.eval(), mix=mix)


def make(kit: DrafterKit) -> Drafter:
    """A layer from a folder of its own, for this target; which states it reads is checked on the first text."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    target, ids, found = kit.target, kit.names, kit.head
    lm, out = loaded(found.settings, found.tensors(), target, found.name), int(target.model.config.num_hidden_layers)
    check_it = SelfCheck(found.name, ((out,), (LAST,)))
    features = HeadFeatures(lm, TextStates(target, [out], range(lm.vocabulary), check=check_it))
    return HeadDrafter(lm, features, ids.rows, kit.ranking, found.name, ids.never, window=kit.window)
