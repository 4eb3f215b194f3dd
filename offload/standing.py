"""Single layers of a loaded model with weights that stay: for whoever computes with some layers while others stream."""

import copy

from torch import nn
from transformers import PreTrainedModel

from offload.layer import StreamedLayer, _places
from offload.lender import Stream
from offload.stream import LayerStream


def standing_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """One layer of a model that `load` returned, as a module of its own.

    Its weights are the very tensors of a layer that stays in memory, else copies. Not while the model computes.
    """
    layers = [module for module in model.modules() if isinstance(module, StreamedLayer)]
    inner: nn.Module = layers[index].__dict__["inner"]
    lender: Stream = layers[index].__dict__["_lender"]
    layer = copy.deepcopy(inner)
    tensors = lender.take(index)
    try:
        for place in _places(layer):
            tensor = tensors[place.name]
            kept = tensor if isinstance(lender, LayerStream) and lender.stays(index) else tensor.clone()
            is_parameter = isinstance(place.placeholder, nn.Parameter)
            place.table[place.key] = nn.Parameter(kept, requires_grad=False) if is_parameter else kept
    finally:
        lender.give()
    return layer
