"""The layer that came with the target (multi-token prediction) as a model that drafts. Knows no file.

z_i = layer(eh_proj [enorm(E t_i) ; hnorm(h_{i-1})]),  h_i = norm(z_i),  logits head(h_i); h_{i-1} is the target's last
hidden state behind its last norm, or that of the parent (DeepSeek-V3, arXiv 2412.19437, equations 21 to 23).
R rows   H hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.errors import UnsupportedArchitecture
from specexec.model.submodel import rebuilt
from specexec.model.taps import LAST
from specexec.model.tree_lm import TreeLM, trunk_name


def mtp_lm(target: TreeLM, layer: nn.Module, config: PretrainedConfig, hidden_first: bool = False) -> TreeLM:
    """A model of this one layer that shares the target's embeddings and head; `config` is of a target that ends in it.

    `hidden_first`: eh_proj reads [hnorm(h_{i-1}) ; enorm(E t_i)].

    Raises UnsupportedArchitecture where the target ends in something else than one norm.
    """
    number = int(config.num_hidden_layers) - 1
    model = rebuilt(target.model, {number: layer}, config)
    trunk = model.get_submodule(trunk_name(model))
    if "norm" not in trunk._modules:
        raise UnsupportedArchitecture(
            f"architecture {config.model_type!r} cannot guess further ahead: its last norm was not found.",
            hint="--drafter ngram, or a model.",
        )
    trunk._modules["norm"] = layer.get_submodule("shared_head.norm")
    enorm, hnorm, projection = (layer.get_submodule(name) for name in ("enorm", "hnorm", "eh_proj"))
    embeddings = model.get_input_embeddings()

    def mix(tokens_R: Tensor, hidden_RH: Tensor) -> Tensor:
        both = enorm(embeddings(tokens_R)), hnorm(hidden_RH)
        mixed_RH: Tensor = projection(torch.cat(both[::-1] if hidden_first else both, -1))
        return mixed_RH

    return target.alike(model, [number], mix)


def make(kit: DrafterKit) -> Drafter:
    """The layer read, and what it may name."""
    assert isinstance(kit.target, TreeLM)
    brought, ids = kit.mtp_layer(), kit.names
    lm = mtp_lm(kit.target, brought.layer, brought.config, brought.hidden_first)
    features = HeadFeatures(lm, TextStates(kit.target, [LAST], range(lm.vocabulary)))
    return HeadDrafter(lm, features, ids.rows, kit.ranking, "mtp", ids.never, window=kit.window)
