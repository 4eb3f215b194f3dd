"""The one place where a drafter's errors end: an error costs its guesses, never an answer.

A drafter that raised is not asked again about the texts that were open then, because what it remembers of them may be
wrong; it is asked about later ones. The first failure is logged, with its reason. Interrupts pass, and so does refused
memory: the caller frees some and tries again.   N nodes   K children
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakSet

import numpy as np
import torch

from specexec.drafters.protocol import Ask, Drafter, Guesses, nothing
from specexec.errors import SpecexecError, SweepCancelled
from specexec.text.sequence import Sequence
from specexec.tree.tree import Ints, TokenTree

log = logging.getLogger(__name__)


class Guarded:
    """Answers as `inside` does, and with nothing where that fails."""

    def __init__(self, inside: Drafter) -> None:
        self.inside = inside
        self.name, self.context = inside.name, inside.context
        self.failure: str | None = None
        self._off: WeakSet[Sequence] = WeakSet()

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        """What `inside` has at hand."""
        found: list[Ask] = []
        with self._costing_guesses_only(ask.sequence for ask in asks):
            found = self.inside.at_hand(self._open(asks))
        return found

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        """What `inside` guesses; ids that the target has no row for are left out."""
        open_to, said = self._open(asks), dict[int, Guesses]()
        with self._costing_guesses_only(ask.sequence for ask in asks):
            answers = self.inside.guess(open_to, width) if open_to else []
            said = {id(ask): _sound(ask, answer) for ask, answer in zip(open_to, answers, strict=True)}
        return [said[id(ask)] if id(ask) in said else nothing(ask) for ask in asks]

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None:
        """Let `inside` learn."""
        if sequence not in self._off:
            with self._costing_guesses_only([sequence]):
                self.inside.observe(sequence, tree, choices_M, kept)

    def _open(self, asks: list[Ask]) -> list[Ask]:
        return [ask for ask in asks if ask.sequence not in self._off] if self._off else asks

    @contextmanager
    def _costing_guesses_only(self, sequences: Iterable[Sequence]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, SweepCancelled) or _memory_refused(error):
                raise
            self._off.update(sequences)
            own = isinstance(error, SpecexecError)  # whose words are meant for people
            reason = str(error) if own else f"{type(error).__name__}: {error}"
            log.debug("what the drafter failed with", exc_info=error)
            if self.failure is None:
                log.warning(
                    "the drafter %s failed and is left out where it did; texts stay what they are, but take more "
                    "sweeps: %s",
                    self.name, reason,
                )  # fmt: skip
            self.failure = reason


def _sound(ask: Ask, answer: Guesses) -> Guesses:
    tokens_NK, rows = answer.tokens_NK, ask.sequence.noise.vocabulary
    assert tokens_NK.shape == answer.log_probs_NK.shape, "a chance for every child"
    assert len(tokens_NK) == len(ask.nodes), "children of every node"
    strange_NK = (tokens_NK < 0) | (tokens_NK >= rows)
    if not strange_NK.any():
        return answer
    return replace(
        answer,
        tokens_NK=np.where(strange_NK, 0, tokens_NK),
        log_probs_NK=np.where(strange_NK, -np.inf, answer.log_probs_NK),
    )


def _memory_refused(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or str(getattr(error, "code", "")).startswith("not_enough_")  # the same, as offload says it
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
