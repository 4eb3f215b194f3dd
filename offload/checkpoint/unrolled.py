"""A model that sends each token through its layers several times (HRM), with a layer for each turn, in their order.

Each turn has keys and values of its own in transformers too, and streams as a layer does. Its modelling code stays.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Turns:
    """In the place of a layer of a stack: the module of the turn that its caller says."""

    all: nn.ModuleList
    layer: int

    def __call__(self, hidden: torch.Tensor, cycle_offset: int, **kwargs: Any) -> torch.Tensor:
        turn: Callable[..., torch.Tensor] = self.all[cycle_offset + self.layer]
        return turn(hidden, **kwargs)


def unroll(model: PreTrainedModel) -> None:
    """Give the trunk a list of layers, one for each turn; for a model without weights. Others stay as they are."""
    config = model.config
    if config.model_type != "hrm_text":
        return
    if config.prefix_lm:
        log.warning("tokens of a prompt see those before them alone, as in generate without token_type_ids.")
    trunk = cast(Any, model.get_submodule(model.base_model_prefix))
    kind: type[nn.Module] = type(trunk.L_module.layers[0])
    with torch.device("meta"):
        turns = nn.ModuleList(kind(config, layer_idx=turn) for turn in range(config.num_hidden_layers))
    trunk.layers = turns.to(model.dtype)
    for stack in (trunk.L_module, trunk.H_module):
        del stack.layers
        stack.layers = [_Turns(turns, layer) for layer in range(config.num_layers_per_stack)]
