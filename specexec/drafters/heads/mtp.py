"""The layer that came with the target (multi-token prediction) as a model that drafts. Knows no file.

z_i = layer(eh_proj [enorm(E t_i) ; hnorm(h_{i-1})]),  h_i = norm(z_i),  logits head(h_i); h_{i-1} is the target's last
hidden state behind its last norm, or that of the parent (DeepSeek-V3, arXiv 2412.19437, equations 21 to 23). Some read
the state before the norm, and hand on z_i. A step may have several layers, and a head of its own.
R rows   H hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.kit import BroughtLayers, DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.errors import UnsupportedArchitecture
from specexec.model.submodel import rebuilt
from specexec.model.taps import LAST
from specexec.model.tree_lm import TreeLM, trunk_name

NORMS = ("norm", "norm_f")


def mtp_lm(target: TreeLM, brought: BroughtLayers) -> TreeLM:
    """A model of these layers that shares the target's embeddings, and its head where they have none.

    Raises UnsupportedArchitecture where the target ends in something else than one norm.
    """
    first, config, layout = brought.layers[0], brought.config, brought.layout
    numbers = range(int(config.num_hidden_layers) - len(brought.layers), int(config.num_hidden_layers))
    model = rebuilt(target.model, dict(zip(numbers, brought.layers, strict=True)), config)
    trunk = model.get_submodule(trunk_name(model))
    last = next((name for name in NORMS if name in trunk._modules), None)
    if last is None:
        raise UnsupportedArchitecture(
            f"architecture {config.model_type!r} cannot guess further ahead: its last norm was not found.",
            hint="--drafter ngram, or a model.",
        )
    norm, shared = first.get_submodule("shared_head.norm"), first.get_submodule("shared_head")
    trunk._modules[last] = nn.Identity() if layout.before_norm else norm
    out = shared._modules.get("output") or model.get_output_embeddings()
    if out is not model.get_output_embeddings() or layout.before_norm:
        model.set_output_embeddings(nn.Sequential(norm, out) if layout.before_norm else out)
    enorm, hnorm, projection = (first.get_submodule(name) for name in ("enorm", "hnorm", "eh_proj"))
    embeddings = model.get_input_embeddings()

    def mix(tokens_R: Tensor, hidden_RH: Tensor) -> Tensor:
        both = enorm(embeddings(tokens_R)), hnorm(hidden_RH)
        mixed_RH: Tensor = projection(torch.cat(both[::-1] if layout.hidden_first else both, -1))
        return mixed_RH

    idle = [None] * (int(model.config.num_hidden_layers) - len(numbers))  # LongCat counts each layer as two
    return target.alike(model, [*idle, *numbers], mix)


def read_states(target: TreeLM, brought: BroughtLayers) -> TextStates:
    """What these layers read of the target's texts."""
    tap = len(target.kinds) if brought.layout.before_norm else LAST
    return TextStates(target, [tap], range(target.vocabulary))


def make(kit: DrafterKit) -> Drafter:
    """The layer read, and what it may name."""
    assert isinstance(kit.target, TreeLM)
    brought, ids = kit.mtp_layer(), kit.names
    lm = mtp_lm(kit.target, brought)
    features = HeadFeatures(lm, read_states(kit.target, brought))
    return HeadDrafter(lm, features, ids.rows, kit.ranking, "mtp", ids.never, window=kit.window)
