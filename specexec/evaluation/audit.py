"""Was the text really the target's own? Compares drafting with plain decoding, and examines the first difference."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from specexec.engine.engine import Engine
from specexec.model.cache import common_prefix
from specexec.sampling.params import SamplingParams
from specexec.text.messages import Prompt


@dataclass(frozen=True)
class Audit:
    """One prompt answered twice. `first` is the index of the first differing token of the answers, None if there is
    none; `margin` is how far apart the two tokens' scores lie when the text before them is processed again: a
    near-tie that rounding may flip has a margin of rounding size.
    """

    tokens: int
    sweeps: int
    first: int | None
    margin: float | None

    @property
    def identical(self) -> bool:
        return self.first is None


def audit(llm: Engine, prompt: Prompt, sampling: SamplingParams) -> Audit:
    """Answer with the engine's drafter and budget, then without any guess; both with the same seed."""
    guessed = llm.generate(prompt, sampling)
    sampling = replace(sampling, seed=guessed.seed)
    budget, llm.budget = llm.budget, 0
    try:
        plain = llm.generate(prompt, sampling)
    finally:
        llm.budget = budget
    first = first_difference(guessed.tokens, plain.tokens)
    margin = None
    if first is not None and first < min(len(guessed.tokens), len(plain.tokens)):
        before = plain.tokens[:first]
        scores_V = llm.scores(prompt, before, sampling)
        margin = float((scores_V[plain.tokens[first]] - scores_V[guessed.tokens[first]]).abs())
    return Audit(len(guessed.tokens), guessed.sweeps, first, margin)


def first_difference(left: Items[int], right: Items[int]) -> int | None:
    """Where two texts part; None if they are equal."""
    shared = common_prefix(left, right)
    return None if shared == len(left) == len(right) else shared
