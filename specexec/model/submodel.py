"""A model made of parts of another: embeddings, norms and head shared, its list of layers replaced. No files.

L layers of the whole model
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from specexec.errors import UnsupportedArchitecture
from specexec.model.module_types import Configured


def rebuilt(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], whole: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The same model with only `layers`, by their numbers in the whole one and in that order; nothing is copied.

    `whole`: the config that knows those numbers, where it is not the model's own.
    """
    config = partial_config(whole or model.config, list(layers))
    path = layer_list_path(model)
    config._attn_implementation = model.config._attn_implementation
    top: nn.Module = _fork(model, config)
    parent = top
    for name in path[:-1]:
        child = _fork(parent.get_submodule(name), config)
        parent._modules[name] = child
        parent = child
    parent._modules[path[-1]] = nn.ModuleList(layers.values())
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, Configured):  # a copied layer came with a copy, which misses how the whole attends
                module.config = model.config
    assert isinstance(top, PreTrainedModel)
    return top


def partial_config(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    """What the config would say about a model of just these layers."""
    times = _attentions(config)
    if times > 1 and kept != [config.num_hidden_layers - 1]:  # that one guesses further ahead, and attends once
        raise UnsupportedArchitecture(
            "architecture 'longcat_flash' cannot draft with its own layers: each attends twice.",
            hint="--drafter ngram, or a model.",
        )
    borrows = getattr(config, "num_kv_shared_layers", 0) or "shared" in (getattr(config, "indexer_types", None) or ())
    if borrows and len(kept) != config.num_hidden_layers:
        raise UnsupportedArchitecture(
            f"architecture {config.model_type!r} cannot draft with some layers: some depend on what others have found.",
            hint="--drafter substitute, ngram, or a model.",
        )
    partial = copy.deepcopy(config)
    for name in ("layer_types", "indexer_types", "no_rope_layers"):
        each: list[object] | None = getattr(config, name, None)
        if each is not None:
            _say(partial, name, [each[layer] for layer in kept])
    partial.num_hidden_layers = times * len(kept)
    return partial


def _say(config: PretrainedConfig, name: str, each: list[object]) -> None:
    """Set what differs from layer to layer, even where it is worked out from other settings (Jamba, Falcon-H1)."""
    name = config.attribute_map.get(name, name)
    if isinstance(getattr(type(config), name, None), property):
        config.__class__ = type(type(config).__name__, (type(config),), {name: each})
    else:
        setattr(config, name, each)


def _attentions(config: PretrainedConfig) -> int:
    """How often one layer attends, and is counted: LongCat's twice."""
    return 2 if config.model_type == "longcat_flash" else 1


def layer_list_path(model: PreTrainedModel) -> list[str]:
    """Where the decoder layers hang: the topmost list with as many entries as the config counts layers."""
    count = model.config.num_hidden_layers // _attentions(model.config)
    waiting: deque[tuple[list[str], nn.Module]] = deque([([], model)])
    while waiting:
        path, module = waiting.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path
        waiting.extend(([*path, name], child) for name, child in module.named_children())
    raise AssertionError("a causal LM has a list of layers")


def _fork(module: nn.Module, config: PretrainedConfig) -> nn.Module:
    """A second container of the same children, parameters and buffers."""
    fork = copy.copy(module)
    fork._modules = dict(module._modules)
    if isinstance(fork, Configured):
        fork.config = config
    return fork
