"""Where the experts of a layer are, and which of them a forward asks for. Knows transformers' modules, no bytes."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Argument = torch.Tensor | object


def experts_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a layer's fused experts, one along the first dimension of each of its parameters.

    Only classes that transformers' experts interface computes: whatever its kernel, it touches no expert that no row
    was sent to. None for a layer without, or with experts that are modules of their own.
    """
    for name, module in layer.named_modules():
        count = getattr(module, "num_experts", None)
        held = list(module.parameters())
        if held and hasattr(module, "is_transposed") and all(tensor.shape[:1] == (count,) for tensor in held):
            return name, module
    return None


@contextmanager
def when_chosen(experts: nn.Module | None, fetch: Callable[[Collection[int]], None]) -> Iterator[None]:
    """While this is open, `fetch` is told before `experts` compute which of them rows were sent to."""
    if experts is None:
        yield
        return
    everyone = range(int(getattr(experts, "num_experts")))  # noqa: B009 - nn.Module types every attribute as a Tensor

    def chosen(_: nn.Module, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        indices = [tensor for tensor in tensors if tensor.dtype == torch.int64]
        # A number that is none of theirs stands for no expert.
        union = {index for tensor in indices for index in tensor.unique().tolist()} & {*everyone}
        fetch(union if indices else everyone)

    with experts.register_forward_pre_hook(chosen, with_kwargs=True):
        yield
