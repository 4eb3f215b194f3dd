"""What some modules carry besides tensors and modules, as types that `isinstance` can check.

nn.Module declares every attribute as a Tensor or a Module, whatever it is. Attributes of other types are named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import nn
from transformers import PretrainedConfig


@runtime_checkable
class Configured(Protocol):
    """A module that reads its config whenever it computes."""

    config: PretrainedConfig


@runtime_checkable
class TakesChunks(Protocol):
    """A layer that can compute a sweep's rows in pieces, at one visit of its weights (offload's StreamedLayer).

    `chunk_rows`: so many rows at a time. `tokens`: of the rows that differ, others fill a tile. `together`: ranges of
    rows that must be in one piece.
    """

    chunk_rows: int | None
    tokens: Sequence[int]
    together: Sequence[range]


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model, also those that streamed layers hide."""
    for module in model.modules():
        inner = getattr(module, "inner", None)
        yield from inner.modules() if isinstance(inner, nn.Module) else [module]
