"""The layer in front of Hydra++: what it makes of the target's states takes their place. One layer of Llama's kind.

For token t_i it reads the target's state at i-1, at the position i, and attends to the rows of the text before.
R rows   H hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from specexec.drafters.heads.filled import TargetSizes, beside_tables, fill
from specexec.drafters.heads.refusal import unread
from specexec.drafters.heads.shallow.fields import HYDRA_PREFIX
from specexec.drafters.heads.shallow.hydra import Hydra
from specexec.model.submodel import partial_config
from specexec.model.tree_lm import TreeLM


def layer_in_front(target: TreeLM, hydra: Hydra, own: Mapping[str, Tensor], name: str) -> TreeLM:
    """The layer as a model whose head is its last norm, so what it says of a row is a state; all weights are filled in.

    Raises BadDrafter, by name, for a target of another kind, or where parts are missing.
    """
    refused = partial(unread, HYDRA_PREFIX, name)
    kind = target.model.config.model_type
    if kind != "llama":
        raise refused(f"its layer is one of Llama's, and the model's are those of {kind!r}")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(partial_config(target.model.config, [0]))
    whole, sizes = nn.Module(), TargetSizes.of(target)
    for part, module in hydra.named_children():
        whole.add_module(part, module)
    whole.add_module("prefix", model.get_submodule("model.layers.0"))
    whole.add_module("prefix_norm", model.get_submodule("model.norm"))
    fill(whole, own, sizes, refused)
    beside_tables(model, sizes.device).add_module("norm", nn.Identity())
    model.add_module("lm_head", whole.get_submodule("prefix_norm"))
    return target.alike(model.eval(), mix=_states)


def _states(_: Tensor, states_RH: Tensor) -> Tensor:
    return states_RH
