"""The layer that a checkpoint brings to guess further ahead, as a module that stays in memory. Computes nothing.

It is the model's next layer, of its own class: `enorm`, `hnorm`, `eh_proj` and `shared_head.norm` hang on it. Where a
step has several layers they hang on the first.
"""

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig

from offload.checkpoint.headers import Folder
from offload.checkpoint.layout import Checkpoint, lay_out_layers
from offload.checkpoint.mtp import AROUND, OWN_HEAD, PROJECTION, MtpLayout, mtp_folder, mtp_layout, mtp_names
from offload.checkpoint.skeleton import Skeleton, build
from offload.errors import UnsupportedModel
from offload.machine.speeds import reading_for
from offload.model.layer import places
from offload.stream.store import Arena, DiskStore


@dataclass(frozen=True)
class MtpLayers:
    """The layers of one step, and the settings of a model that has them as its last ones."""

    layers: tuple[nn.Module, ...]
    config: PreTrainedConfig
    layout: MtpLayout


class Half(nn.Module):
    """The second half of a layer that attends twice, without its experts: a layer that attends once."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlps"):
            self.add_module(name.removesuffix("s"), whole.get_submodule(f"{name}.1"))

    def forward(self, hidden_states: Tensor, **how: object) -> Tensor:
        """What flows out of it; `how` it attends is its attention's own."""
        part = self.get_submodule
        found, *_ = part("self_attn")(part("input_layernorm")(hidden_states), **how)
        attended: Tensor = hidden_states + found
        added: Tensor = part("mlp")(part("post_attention_layernorm")(attended))
        return attended + added


@dataclass(frozen=True)
class MtpPlan:
    """Where its tensors are and where they go: the last layers of a skeleton, by their numbers."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    numbers: range


def plan_mtp_layer(folder: Folder, dtype: torch.dtype | None, trust_remote_code: bool = False) -> MtpPlan:
    """Lay it out; reads no weight. Raises BadModelDir where tensors are missing, UnsupportedModel for other layers."""
    skeleton = build(folder, dtype, trust_remote_code, longer=True)
    end = len(skeleton.layer_list)
    numbers = range(end - mtp_layout(folder).layers, end)
    first = numbers[0]
    if mtp_layout(folder).halved:
        skeleton.layer_list[first] = Half(skeleton.layer_list[first])
    layers = {skeleton.layer_list[first], skeleton.whole.get_submodule(f"{skeleton.whole_layers}.{first}")}
    for layer in layers:
        _surround(layer, skeleton, folder)
    return MtpPlan(skeleton, lay_out_layers(mtp_folder(folder), skeleton, numbers), numbers)


def load_mtp_layer(
    folder: Folder, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> MtpLayers:
    """Read it, dense. Raises as `plan_mtp_layer` does, and ReadFailed."""
    plan = plan_mtp_layer(folder, dtype, trust_remote_code)
    layers = tuple(plan.skeleton.layer_list[number] for number in plan.numbers)
    disk = DiskStore(plan.checkpoint, reading_for(folder.weights_at))
    try:
        for block, layer in zip(plan.checkpoint.layers, layers, strict=True):
            stored = Arena(block.size_B)
            disk.read_block(block, stored)
            tensors = block.dense(block.views(stored.flat), Arena(block.dense_B).flat)
            dequantised = {item.name for item in block.packed}
            for place in places(layer):
                # What lies beside codes is copied, or they would stay in memory with it.
                beside = bool(dequantised) and place.name not in dequantised
                place.keep(tensors[place.name].to(device, copy=beside))
            layer.to(device)
    finally:
        disk.close()
    return MtpLayers(layers, plan.skeleton.model.config, mtp_layout(folder))


def _surround(layer: nn.Module, skeleton: Skeleton, folder: Folder) -> None:
    """What is around the layer, without weights; its norms are of the class of the layer's own."""
    own = next((one for name in ("input_layernorm", "norm") if (one := getattr(layer, name, None)) is not None), None)
    if not isinstance(own, nn.Module):
        raise UnsupportedModel(
            f"the layer of {folder.path} that guesses further ahead is of a kind that is not known.",
            hint="--drafter ngram, or a model.",
        )
    config, dtype = skeleton.model.config, skeleton.dtype
    hidden = int(config.hidden_size)
    eps = next((value for name, value in vars(own).items() if name in ("variance_epsilon", "eps")), 1e-6)
    layout, names = mtp_layout(folder), [*mtp_names(folder).values()]
    biased = any(f"{PROJECTION}.bias" in new for new in names)
    with init_empty_weights(include_buffers=False):
        layer.enorm, layer.hnorm = type(own)(hidden, eps=eps).to(dtype), type(own)(hidden, eps=eps).to(dtype)
        layer.add_module(PROJECTION, nn.Linear(2 * hidden, hidden, bias=biased, dtype=dtype))
        layer.shared_head = nn.Module()
        normed = AROUND[-1] in layout.around
        layer.shared_head.norm = type(own)(hidden, eps=eps).to(dtype) if normed else nn.Identity()
        if any(f"{OWN_HEAD}.weight" in new for new in names):
            layer.shared_head.output = nn.Linear(hidden, int(config.vocab_size), bias=False, dtype=dtype)
