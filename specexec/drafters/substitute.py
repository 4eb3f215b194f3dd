"""The target drafts for itself with a copy of its layers in few bits (SubSpec, Wang et al. 2025). Knows no file.

For targets that stream at higher precision: the copy stays on the device, embeddings, norms and head are shared, keys
and values are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from specexec.drafters.cascade import Cascade
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.quick_layers import quicken
from specexec.model.submodel import rebuilt
from specexec.model.tree_lm import TreeLM


def substituting(
    target: TreeLM,
    layers: Mapping[int, nn.Module],
    vocabulary: int,
    ranking: Ranking | None = None,
    cascade: Cascade | None = None,
    name: str = "substitute",
    never: Iterable[int] = (),
    window: int | None = None,
) -> SiblingDrafter:
    """A drafter over copies of the target's layers that went through `few_bits.quantised`. Changes them."""
    for layer in layers.values():
        quicken(layer)
    lm = target.alike(rebuilt(target.model, layers))
    return SiblingDrafter(lm, vocabulary, ranking, name=name, cascade=cascade, never=never, window=window)
