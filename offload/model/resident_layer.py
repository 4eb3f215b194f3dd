"""Single layers of a loaded model with weights that stay in memory while the others stream."""

import copy

from torch import nn
from transformers import PreTrainedModel

from offload.model.layer import StreamedLayer, _places
from offload.stream.protocol import Stream
from offload.stream.stream import LayerStream


def standing_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """One layer of a model that `load` returned, as a module of its own.

    Its weights are the very tensors of a layer that stays in memory, else copies. Not while the model computes.
    """
    lender, stays = _lender(model, index), stands(model, index)
    layer = copy.deepcopy(skeleton_layer(model, index))
    tensors = lender.take(index)
    try:
        for place in _places(layer):
            tensor = tensors[place.name]
            kept = tensor if stays else tensor.clone()
            is_parameter = isinstance(place.placeholder, nn.Parameter)
            place.table[place.key] = nn.Parameter(kept, requires_grad=False) if is_parameter else kept
    finally:
        lender.give()
    return layer


def stands(model: PreTrainedModel, index: int) -> bool:
    """Whether a standing layer takes no memory of its own. A layer in few bits that stays is dense only in its turn."""
    lender = _lender(model, index)
    return isinstance(lender, LayerStream) and lender.stays(index)


def skeleton_layer(model: PreTrainedModel, index: int) -> nn.Module:
    """One layer of a model that `load` returned: its modules, whose weights are there only while it computes."""
    inner: nn.Module = _wrapped(model, index).__dict__["inner"]
    return inner


def _lender(model: PreTrainedModel, index: int) -> Stream:
    lender: Stream = _wrapped(model, index).__dict__["_lender"]
    return lender


def _wrapped(model: PreTrainedModel, index: int) -> StreamedLayer:
    return [module for module in model.modules() if isinstance(module, StreamedLayer)][index]
