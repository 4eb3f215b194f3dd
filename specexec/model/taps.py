"""Hidden states inside a model that drafters read: what flows into a layer, for the tokens of a text. Knows no drafter.

x_0 are the embeddings, x_j is what the first j layers made of them, before any norm; LAST is behind the last norm.
R rows   P positions   H hidden size
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specexec.errors import UnsupportedArchitecture
from specexec.model.submodel import layer_list_path
from specexec.sizes import TAPPED

LAST = -1


@dataclass(frozen=True)
class Tapped:
    """Hidden states [P, H] by tap, of the tokens of one text from position `first` on: the last TAPPED that came."""

    first: int
    states: Mapping[int, Tensor]

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.first + len(next(iter(self.states.values())))

    def between(self, tap: int, first: int, end: int) -> Tensor:
        """Those of one tap at the positions `first` … `end` - 1."""
        return self.states[tap][first - self.first : end - self.first]

    def followed_by(self, more: Tapped) -> Tapped:
        """Both, where `more` goes on at the end of these; else only that: states in between are missing."""
        if more.first != self.end or more.states.keys() != self.states.keys():
            return more
        joined = {tap: torch.cat([rows_PH, more.states[tap]]) for tap, rows_PH in self.states.items()}
        return Tapped(self.first, joined).latest()

    def until(self, end: int) -> Tapped | None:
        """Those before the position `end`, if there are any."""
        kept = end - self.first
        return Tapped(self.first, {tap: rows_PH[:kept] for tap, rows_PH in self.states.items()}) if kept > 0 else None

    def latest(self) -> Tapped:
        """The last TAPPED of them."""
        first = max(self.first, self.end - TAPPED)
        if first == self.first:
            return self
        return Tapped(first, {tap: rows_PH[first - self.first :].clone() for tap, rows_PH in self.states.items()})


class Taps:
    """The taps of one model. While `recording` is open what passes them is kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.wanted: frozenset[int] = frozenset()
        self._model = model

    def add(self, taps: Collection[int]) -> None:
        """Record at these taps too. Raises UnsupportedArchitecture where there is no such layer."""
        count = len(self._layers())
        if beyond := [tap for tap in taps if not LAST <= tap <= count]:
            raise UnsupportedArchitecture(
                f"hidden states of layer {beyond[0]} are asked for, and there are {count} layers.",
                hint="a drafter that was made for this model.",
            )
        self.wanted |= frozenset(taps)

    def record(self, into: dict[int, Tensor]) -> ExitStack:
        """While the result is open every pass puts what flows into the wanted layers into `into`, [R, H] each."""

        def entered(tap: int, _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            into[tap] = _tensor(args[0] if args else kwargs["hidden_states"])

        def left(tap: int, _: nn.Module, __: object, output: object) -> None:
            into[tap] = _tensor(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for tap in self.wanted - {LAST}:
                handle = (
                    self._layers()[tap - 1].register_forward_hook(partial(left, tap))
                    if tap
                    else self._layers()[0].register_forward_pre_hook(partial(entered, tap), with_kwargs=True)
                )
                hooks.callback(handle.remove)
            return hooks.pop_all()

    def _layers(self) -> nn.ModuleList:
        found = self._model.get_submodule(".".join(layer_list_path(self._model)))
        assert isinstance(found, nn.ModuleList)
        return found


def _tensor(found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise UnsupportedArchitecture(
            "its layers hand on something else than hidden states, which no drafter can read."
        )
    return found[0]
