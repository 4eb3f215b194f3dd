"""What is asked of a batch, and what comes of it. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeAlias

from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams
from specexec.stats import Completion

Prompt: TypeAlias = str | Items[int] | Items[dict[str, str]]  # raw text, token ids, or messages for the chat template


@dataclass(frozen=True)
class Request:
    """One prompt of a run. `written` are tokens of its answer that an earlier run has already paid for."""

    index: int
    prompt: Prompt
    sampling: SamplingParams
    written: tuple[int, ...] = ()


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
    """How far an unfinished answer has come. A Request with these tokens as `written` goes on from there."""

    index: int
    tokens: tuple[int, ...]


Result: TypeAlias = Completion | Failure
