"""Requests of a batch and their results. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import TypeAlias

from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion
from specexec.text.messages import Prompt
from specexec.text.template_options import Wishes


@dataclass(frozen=True)
class Request:
    """One prompt of a run. `written` are tokens of its answer that an earlier run has already computed.

    `wishes` are for the chat template of messages. `grammar` is a grammar's text (see Engine.grammar), which unlike a
    grammar can be sent to another process.
    """

    index: int
    prompt: Prompt
    sampling: SamplingParams
    written: tuple[int, ...] = ()
    wishes: Wishes | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class Failure:
    """A prompt that could not be answered, and why; the others are not touched by it."""

    index: int
    error: SpecexecError

    @property
    def code(self) -> str:
        return self.error.code


@dataclass(frozen=True)
class Partial:
    """How far an unfinished answer has come. A Request with these tokens as `written` continues from there."""

    index: int
    tokens: tuple[int, ...]


Result: TypeAlias = Completion | Failure


@dataclass(frozen=True)
class Continuation:
    """Token ids whose probability is asked for, after a context of at least one token id."""

    context: Items[int]
    tokens: Items[int]

    @cached_property
    def read(self) -> list[int]:
        """What the target has to read: nothing depends on the last token."""
        return [*self.context, *self.tokens][:-1]


@dataclass(frozen=True)
class Likelihood:
    """`log_probs`: natural logarithm of each token's probability given all before it, whatever the temperature.

    `greedy`: whether every token is the likeliest one, so that T = 0 would have written just this.
    """

    log_probs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """The logarithm of the probability of the whole continuation."""
        return fsum(self.log_probs)
