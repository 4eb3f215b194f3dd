"""Decoder layers without their attention or without their MLP: what is left out adds nothing to the residual stream.

A layer that loses both is as if it were not there. Knows no file.
L layers   S = 2 sublayers of a layer: attention, MLP   R packed rows   H hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specexec.model.submodel import rebuilt
from specexec.model.tree_lm import TreeLM

Kept: TypeAlias = NDArray[np.bool_]
"""[L, 2]: which sublayers stay."""
Output: TypeAlias = "Tensor | tuple[Tensor | None, ...]"

ATTENTION, MLP = 0, 1
NAMES = (("self_attn", "attention", "attn"), ("mlp", "feed_forward"))  # in the modelling code of transformers


def names_of(layer: nn.Module) -> tuple[str, str] | None:
    """Where attention and MLP are in a layer; None where they are not modules of its own, or there is a recurrence
    beside them (Falcon-H1): it goes or stays whole.
    """
    attention, mlp = (
        next((name for name in names if isinstance(getattr(layer, name, None), nn.Module)), None) for names in NAMES
    )
    others = (child for name, child in layer.named_children() if name not in (attention, mlp))
    return (attention, mlp) if attention and mlp and not any(hasattr(one, "layer_idx") for one in others) else None


def without(layer: nn.Module, kept_S: NDArray[np.bool_], hidden: int) -> nn.Module:
    """The layer with what is not kept of it replaced, and its weights let go. Changes `layer`."""
    if kept_S.all():
        return layer
    names = names_of(layer)
    assert names is not None, "a layer without such modules stays or goes whole"
    if not kept_S[ATTENTION]:
        layer._modules[names[ATTENTION]] = Nothing(paired=True)
    if not kept_S[MLP]:
        mlp = layer.get_submodule(names[MLP])
        weight = next(mlp.parameters())
        with torch.no_grad():  # some give their router's scores as well: one row of zeros shows it
            answer = mlp(torch.zeros(1, 1, hidden, dtype=weight.dtype, device=weight.device))
        layer._modules[names[MLP]] = Nothing(paired=isinstance(answer, tuple))
    return layer


class Nothing(nn.Module):
    """Replaces a sublayer, and adds zeros; `paired` like those that give attention maps or scores as well."""

    def __init__(self, paired: bool) -> None:
        super().__init__()
        self._paired = paired

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Output:
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, None) if self._paired else zeros


def partial_lm(lm: TreeLM, layer_of: Callable[[int], nn.Module], kept_LS: Kept) -> TreeLM:
    """A causal LM of just these sublayers of `lm`. `layer_of` gives layers of its own; one is whole at a time."""
    hidden, numbers = int(lm.model.config.hidden_size), np.flatnonzero(kept_LS.any(1)).tolist()
    parts = {number: without(layer_of(number), kept_LS[number], hidden) for number in numbers}
    return lm.alike(rebuilt(lm.model, parts), [number if kept_LS[number, ATTENTION] else None for number in numbers])


def sizes_of(layers: Items[nn.Module]) -> NDArray[np.int64]:
    """Bytes of every sublayer, [L, 2]; what belongs to neither, and all of a layer that goes whole, counts as MLP's."""
    sizes = []
    for layer in layers:
        names = names_of(layer)
        attention_B = _size_B(layer.get_submodule(names[ATTENTION])) if names else 0
        sizes.append((attention_B, _size_B(layer) - attention_B))
    return np.array(sizes, np.int64)


def _size_B(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def masked(layers: nn.ModuleList, kept_RLS: Tensor) -> Iterator[None]:
    """While this is open, each row of one forward through all `layers` goes without the sublayers it does not keep.

    kept_RLS: bool. So the rows of many texts try as many sets in one visit of the weights.
    """
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            kept_RS = kept_RLS[:, number]
            hooks.callback(layer.register_forward_hook(_Passing(kept_RS.any(1)), with_kwargs=True).remove)
            for name, kept_R in zip(names_of(layer) or (), kept_RS.T, strict=False):
                module = getattr(layer, name)
                hooks.callback(module.register_forward_hook(_Silencing(kept_R)).remove)
        yield


class _Silencing:
    """A hook behind a sublayer: rows that do not keep it get zeros. Long inputs come in pieces, in order."""

    def __init__(self, kept_R: Tensor) -> None:
        self._kept_R, self._done = kept_R, 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: Output) -> Output:
        first = _first(output)
        kept_R1 = _of_rows(self._kept_R[self._done :], first)
        self._done += first.shape[-2]
        return _with_first(output, first * kept_R1)


class _Passing:
    """A hook behind a layer: rows that keep nothing of it come out as they went in."""

    def __init__(self, kept_R: Tensor) -> None:
        self._kept_R = kept_R

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Output) -> Output:
        first = _first(output)
        given = args[0] if args else kwargs["hidden_states"]
        return _with_first(output, torch.where(_of_rows(self._kept_R, first), first, given))


def _first(output: Output) -> Tensor:
    """The hidden states among what a module gave back."""
    first = output[0] if isinstance(output, tuple) else output
    assert first is not None
    return first


def _with_first(output: Output, hidden: Tensor) -> Output:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _of_rows(kept_R: Tensor, hidden: Tensor) -> Tensor:
    """One entry for each row of the hidden states, [R, 1]; rows beyond the last text are padding."""
    count = hidden.shape[-2]
    return nn.functional.pad(kept_R[:count], (0, max(count - len(kept_R), 0)), value=True).unsqueeze(-1)
