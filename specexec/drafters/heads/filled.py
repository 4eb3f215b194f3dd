"""The tensors of a folder in the module of a head: what is missing, unknown or of another shape is refused by name.

H hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specexec.errors import BadDrafter
from specexec.model.tree_lm import TreeLM


@dataclass(frozen=True)
class TargetSizes:
    """What a head has to fit, and what it shares."""

    hidden: int
    device: torch.device
    dtype: torch.dtype
    embeddings_VH: Tensor

    @classmethod
    def of(cls, target: TreeLM) -> TargetSizes:
        """Those of a model that is loaded."""
        embeddings_VH = target.model.get_input_embeddings().weight
        assert isinstance(embeddings_VH, Tensor)
        return cls(int(embeddings_VH.shape[1]), target.device, target.model.dtype, embeddings_VH)


def fill(
    head: nn.Module, tensors: Mapping[str, Tensor], target: TargetSizes, refused: Callable[[str], BadDrafter]
) -> None:
    """Give a module that was made without memory its weights. Raises what `refused` makes of a reason."""
    wanted = {key: tuple(one.shape) for key, one in head.state_dict().items()}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise refused(f"'{odd[0]}' is {'missing' if odd[0] in wanted else 'a part that is not known'}")
    if misfit := next((key for key, shape in wanted.items() if tuple(tensors[key].shape) != shape), None):
        raise refused(f"'{misfit}' has the shape {list(tensors[misfit].shape)}, expected {list(wanted[misfit])}")
    head.load_state_dict({key: one.to(target.device, target.dtype) for key, one in tensors.items()}, assign=True)
    head.requires_grad_(False).eval()
