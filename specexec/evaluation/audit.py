"""Was the text really the target's own? Compares drafting with plain decoding, and examines the first difference.

Keys and values in few bits make it another model's: how far that one is from the model itself is measured here too.
"""

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
    kv_effect: KVEffect | None = None

    @property
    def identical(self) -> bool:
        return self.first is None


@dataclass(frozen=True)
class KVEffect:
    """What few bits of keys and values change along one answer: so many of its `places` would have had another
    likeliest token, and the mean divergence KL(whole, few bits) there, in nats.
    """

    places: int
    changed: int
    divergence: float


def kv_effect(llm: Engine, prompt: Prompt, answer: Items[int], sampling: SamplingParams) -> KVEffect:
    """Read an answer twice, with keys and values as they are computed and in the engine's few bits."""
    both = zip(
        llm.log_probs_along(prompt, answer, sampling, kv_whole=True),
        llm.log_probs_along(prompt, answer, sampling),
        strict=True,
    )
    changed, divergence = 0, 0.0
    for whole_RV, few_RV in both:
        changed += int((whole_RV.argmax(-1) != few_RV.argmax(-1)).sum())
        divergence += float((whole_RV.exp() * (whole_RV - few_RV)).nan_to_num_(0.0).sum())
    return KVEffect(len(answer), changed, divergence / max(len(answer), 1))


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
    effect = kv_effect(llm, prompt, guessed.tokens, sampling) if llm.kv_quant else None
    return Audit(len(guessed.tokens), guessed.sweeps, first, margin, effect)


def first_difference(left: Items[int], right: Items[int]) -> int | None:
    """Where two texts part; None if they are equal."""
    shared = common_prefix(left, right)
    return None if shared == len(left) == len(right) else shared
