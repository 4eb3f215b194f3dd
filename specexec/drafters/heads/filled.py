"""The tensors of a folder in the module of a head: what is missing, unknown or of another shape is refused by name.

H hidden size   V vocabulary   S tokens that a head names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

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

    def embedded(self, tokens: Tensor) -> Tensor:
        """Rows [..., H] of the target's embeddings, where the target computes."""
        return embedding(tokens.to(self.embeddings_VH.device), self.embeddings_VH).to(self.device)


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


def beside_tables(model: PreTrainedModel, device: torch.device) -> nn.Module:
    """The trunk of a model made without memory, with rotary tables, and without embeddings: `mix` looks tokens up."""
    trunk = model.get_submodule("model")
    rotary = trunk.get_submodule("rotary_emb")
    trunk.add_module("rotary_emb", type(rotary)(config=model.config).to(device))
    trunk.add_module("embed_tokens", nn.Identity())
    return trunk


def ids_of(d2t_S: Tensor, t2d_V: Tensor | None, vocabulary: int, refused: Callable[[str], BadDrafter]) -> list[int]:
    """What the rows of a head stand for: d + d2t[d], or d2t[d] itself where that is what t2d has."""
    named = None if t2d_V is None else t2d_V.flatten().nonzero().flatten().tolist()
    offsets = (d2t_S.long() + torch.arange(len(d2t_S))).tolist()
    for ids in (offsets, d2t_S.tolist()):
        ascending = all(left < right for left, right in pairwise(ids)) and ids[0] >= 0 and ids[-1] < vocabulary
        if ascending and named in (None, ids):
            return ids
    raise refused("its d2t names tokens twice, tokens that the target does not have, or others than its t2d")
