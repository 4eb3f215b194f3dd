"""The layer that a checkpoint brings to guess further ahead, as a module that stays in memory. Computes nothing.

It is the model's next layer, of its own class: `enorm`, `hnorm`, `eh_proj` and `shared_head.norm` hang on it.
"""

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig

from offload.checkpoint.headers import Folder
from offload.checkpoint.layout import Checkpoint, lay_out_layer
from offload.checkpoint.mtp import AROUND, PROJECTION, mtp_folder, mtp_layout, mtp_names
from offload.checkpoint.skeleton import Skeleton, build
from offload.errors import UnsupportedModel
from offload.machine.speeds import reading_for
from offload.model.layer import places
from offload.stream.store import Arena, DiskStore


@dataclass(frozen=True)
class MtpLayer:
    """The layer, and the settings of a model that has it as its last one."""

    layer: nn.Module
    config: PreTrainedConfig
    hidden_first: bool = False
    """Its projection reads the hidden state, then the embedding."""


@dataclass(frozen=True)
class MtpPlan:
    """Where its tensors are and where they go: the last layer of a skeleton."""

    skeleton: Skeleton
    checkpoint: Checkpoint


def plan_mtp_layer(folder: Folder, dtype: torch.dtype | None, trust_remote_code: bool = False) -> MtpPlan:
    """Lay it out; reads no weight. Raises BadModelDir where tensors are missing, UnsupportedModel for other layers."""
    skeleton = build(folder, dtype, trust_remote_code, longer=True)
    last = len(skeleton.layer_list) - 1
    layers = {skeleton.layer_list[last], skeleton.whole.get_submodule(f"{skeleton.whole_layers}.{last}")}
    for layer in layers:
        _surround(layer, int(skeleton.model.config.hidden_size), skeleton.dtype, folder)
    return MtpPlan(skeleton, lay_out_layer(mtp_folder(folder), skeleton, last))


def load_mtp_layer(
    folder: Folder, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> MtpLayer:
    """Read it, dense. Raises as `plan_mtp_layer` does, and ReadFailed."""
    plan = plan_mtp_layer(folder, dtype, trust_remote_code)
    (block,), layer = plan.checkpoint.layers, plan.skeleton.layer_list[-1]
    disk = DiskStore(plan.checkpoint, reading_for(folder.weights_at))
    try:
        stored = Arena(block.size_B)
        disk.read_block(block, stored)
    finally:
        disk.close()
    tensors = block.dense(block.views(stored.flat), Arena(block.dense_B).flat)
    dequantised = {item.name for item in block.packed}
    for place in places(layer):
        # What lies beside codes is copied, or they would stay in memory with it.
        beside = bool(dequantised) and place.name not in dequantised
        place.keep(tensors[place.name].to(device, copy=beside))
    return MtpLayer(layer.to(device), plan.skeleton.model.config, mtp_layout(folder).hidden_first)


def _surround(layer: nn.Module, hidden: int, dtype: torch.dtype, folder: Folder) -> None:
    """What is around the layer, without weights; its norms are of the class of the layer's own."""
    own = getattr(layer, "input_layernorm", None)
    if not isinstance(own, nn.Module):
        raise UnsupportedModel(
            f"the layer of {folder.path} that guesses further ahead is of a kind that is not known.",
            hint="--drafter ngram, or a model.",
        )
    eps = next((value for name, value in vars(own).items() if name in ("variance_epsilon", "eps")), 1e-6)
    layout, biased = mtp_layout(folder), any(f"{PROJECTION}.bias" in new for new in mtp_names(folder).values())
    with init_empty_weights(include_buffers=False):
        layer.enorm, layer.hnorm = type(own)(hidden, eps=eps).to(dtype), type(own)(hidden, eps=eps).to(dtype)
        layer.add_module(PROJECTION, nn.Linear(2 * hidden, hidden, bias=biased, dtype=dtype))
        layer.shared_head = nn.Module()
        normed = AROUND[-1] in layout.around
        layer.shared_head.norm = type(own)(hidden, eps=eps).to(dtype) if normed else nn.Identity()
