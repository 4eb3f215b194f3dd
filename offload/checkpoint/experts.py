"""Where the experts of a layer are, and which of them a forward asks for. Knows transformers' modules, no bytes."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Argument = torch.Tensor | object


@runtime_checkable
class FusedExperts(Protocol):
    """What transformers' experts interface gives a module; nn.Module types every attribute as a Tensor or a Module."""

    num_experts: int
    is_transposed: bool


def experts_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a layer's fused experts, one along the first dimension of each of its parameters.

    Only classes that transformers' experts interface computes: whatever its kernel, it touches no expert that no row
    was sent to. None for a layer without, or with experts that are modules of their own.
    """
    modules: Iterable[tuple[str, nn.Module]] = layer.named_modules()
    return next(((name, module) for name, module in modules if _fused(module)), None)


def _fused(module: nn.Module) -> bool:
    held = list(module.parameters())
    if not (held and isinstance(module, FusedExperts)):
        return False
    return all(tensor.shape[:1] == (module.num_experts,) for tensor in held)


@contextmanager
def when_chosen(
    experts: nn.Module | None, fetch: Callable[[Collection[int], NDArray[np.int64] | None], None]
) -> Iterator[None]:
    """While this is open, `fetch` is called before `experts` compute, with those that rows were routed to.

    And with the choices row by row, [R rows, K], where they come so.
    """
    if experts is None:
        yield
        return
    assert isinstance(experts, FusedExperts)
    everyone = range(experts.num_experts)

    def chosen(_: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        indices = [tensor.cpu().numpy() for tensor in tensors if tensor.dtype == torch.int64]
        # A number that is none of theirs means no expert.
        union = {index for each in indices for index in np.unique(each).tolist()} & {*everyone}
        fetch(union if indices else everyone, indices[0] if len(indices) == 1 and indices[0].ndim == 2 else None)

    with experts.register_forward_pre_hook(chosen, with_kwargs=True):
        yield
