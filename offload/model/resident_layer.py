"""Single layers of a loaded model, with weights that stay in memory while the others stream."""

import copy

from torch import nn
from transformers import PreTrainedModel

from offload.model.layer import places, streamed_layers
from offload.stream.stream import LayerStream


def resident_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """One layer of a model that `load` returned, as a module of its own.

    Its weights are the same tensors for a layer that stays in memory, else copies. Not while the model computes.
    """
    stream, stays = streamed_layers(model)[index].source.stream, is_resident(model, index)
    layer = copy.deepcopy(skeleton_layer(model, index))
    tensors = stream.take(index)
    try:
        for place in places(layer):
            tensor = tensors[place.name]
            place.keep(tensor if stays else tensor.clone())
    finally:
        stream.give()
    return layer


def is_resident(model: PreTrainedModel, index: int) -> bool:
    """Whether a `resident_layer` shares its tensors with the model. A quantised one, dense only in its turn, never."""
    stream = streamed_layers(model)[index].source.stream
    return isinstance(stream, LayerStream) and stream.stays(index)


def skeleton_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """One layer of a model that `load` returned: its modules, whose weights are there only while it computes."""
    return streamed_layers(model)[index].inner
