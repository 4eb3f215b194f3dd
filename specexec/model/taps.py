"""Hidden states inside a model that drafters read: what flows into a layer, for the tokens of a text. Knows no drafter.

x_0 are the embeddings, x_j is what the first j layers made of them, before any norm; LAST is behind the last norm.
R rows   P positions   H hidden size
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specexec.errors import UnsupportedArchitecture
from specexec.model.submodel import layer_list_path
from specexec.sizes import LAST, TAPPED, TRIED_ROWS

__all__ = ["LAST", "Tapped", "Taps"]


@dataclass(frozen=True)
class Tapped:
    """Hidden states [P, H] by tap, of the last tokens of one text before position `end`: at most TAPPED of each tap."""

    end: int
    states: Mapping[int, Tensor]

    def first(self, taps: Iterable[int]) -> int:
        """The position from which on there are those of all these taps."""
        return self.end - min(len(self.states.get(tap, ())) for tap in taps)

    def between(self, tap: int, first: int, end: int) -> Tensor:
        """Those of one tap at the positions `first` … `end` - 1."""
        begin = self.first([tap])
        return self.states[tap][first - begin : end - begin]

    def followed_by(self, more: Tapped) -> Tapped:
        """What `more` has; behind it those of the same taps that `more` goes on from, where none is missing."""

        def joined(tap: int, rows_PH: Tensor) -> Tensor:
            before = self.states.get(tap)
            if before is None or more.end - len(rows_PH) != self.end:
                return rows_PH
            return torch.cat([before, rows_PH])

        return Tapped(more.end, {tap: joined(tap, rows_PH) for tap, rows_PH in more.states.items()}).latest()

    def until(self, end: int) -> Tapped | None:
        """Those before the position `end`, if there are any."""
        less = max(self.end - end, 0)
        kept = {tap: rows_PH[:-less] if less else rows_PH for tap, rows_PH in self.states.items()}
        kept = {tap: rows_PH for tap, rows_PH in kept.items() if len(rows_PH)}
        return Tapped(self.end - less, kept) if kept else None

    def latest(self) -> Tapped:
        """The last TAPPED of each tap."""
        states = {
            tap: rows_PH if len(rows_PH) <= TAPPED else rows_PH[-TAPPED:].clone()
            for tap, rows_PH in self.states.items()
        }
        return Tapped(self.end, states)


class Taps:
    """The taps of one model: what passes them is recorded for those who want it, as long as they exist."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._wanted: WeakKeyDictionary[object, tuple[frozenset[int], frozenset[int]]] = WeakKeyDictionary()

    def want(self, reader: object, taps: Collection[int], tried: Collection[int] = ()) -> None:
        """Record at these taps for this reader, and at no others; at `tried` in sweeps of at most TRIED_ROWS.

        Raises UnsupportedArchitecture where there is no such layer.
        """
        count = len(self._layers())
        if beyond := [tap for tap in (*taps, *tried) if not LAST <= tap <= count]:
            raise UnsupportedArchitecture(
                f"hidden states of layer {beyond[0]} are asked for, and there are {count} layers.",
                hint="a drafter that was made for this model.",
            )
        self._wanted[reader] = frozenset(taps), frozenset(tried)

    def of(self, rows: int) -> frozenset[int]:
        """What a sweep of so many rows records."""
        few = rows <= TRIED_ROWS
        return frozenset[int]().union(*(taps | tried if few else taps for taps, tried in self._wanted.values()))

    def record(self, taps: Collection[int], into: dict[int, Tensor]) -> ExitStack:
        """While the result is open every pass puts what flows into these layers into `into`, [R, H] each."""

        def entered(tap: int, _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            into[tap] = _tensor(args[0] if args else kwargs["hidden_states"])

        def left(tap: int, _: nn.Module, __: object, output: object) -> None:
            into[tap] = _tensor(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as hooks:
            for tap in {*taps} - {LAST}:
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
