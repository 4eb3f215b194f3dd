"""What a user may ask of the sampler, and how logits become a choice. Importing it does not import torch.

A bias, a grammar, penalties and filters follow the order of transformers' own `generate`; they decide which tokens are
allowed. The choice is then argmax(logits + T * G) over the allowed ones (design: one noise, two models). T = 0 needs no
special case.
N rows   V vocabulary
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from specexec.errors import BadSampling

if TYPE_CHECKING:
    from torch import Tensor

    from specexec.grammar import Grammar, Parse
    from specexec.tree import TokenTree


MOST_DECISIVE = 16  # tokens that are looked at one by one: with more of them in doubt, everything is


class NoiseRows(Protocol):
    """Where the noise comes from (noise.py): [P, V] float32 for P positions."""

    def rows(self, positions: Iterable[int]) -> Tensor: ...


@dataclass(frozen=True)
class SamplingParams:
    """How to choose and when to stop.

    None leaves a value to the model (its generation_config.json), and the seed to chance. Off are temperature 0,
    top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other penalties 0.

    `logit_bias` holds (token, what to add to its logit). `grammar` (Engine.grammar) is what the answer must look like.
    `logprobs` asks for the log-probability of every token, and of so many alternatives; `prompt_logprobs` for those of
    the prompt too, which is then read afresh.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _require(self.temperature is None or 0 <= self.temperature < 100, "temperature", self.temperature, "0 to 100")
        _require((self.top_k or 0) >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1 (off)")
        _require(0 <= (self.min_p or 0) <= 1, "min_p", self.min_p, "0 (off) to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is off")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        _require(all(self.stop), "stop", self.stop, "non-empty texts")
        biases = [bias for _, bias in self.logit_bias]
        _require(all(-100 <= bias <= 100 for bias in biases), "logit_bias", biases, "-100 to 100")
        _require((self.logprobs or 0) >= 0, "logprobs", self.logprobs, "0 or more")
        _require(not (self.grammar and self.ignore_eos), "ignore_eos", True, "False: a grammar says where a text ends")

    @property
    def penalised(self) -> bool:
        """Whether a choice depends on more of its own path than the model sees."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def filtered(self) -> bool:
        """Whether some tokens are forbidden whatever the noise says."""
        return bool(self.top_k or self.nucleus < 1 or self.min_p)

    @property
    def nucleus(self) -> float:
        return 1.0 if self.top_p is None else self.top_p

    def derived(self, *names: str | int) -> SamplingParams:
        """The same with a seed derived from its own; without one, the same."""
        return self if self.seed is None else replace(self, seed=derived_seed(self.seed, *names))


def derived_seed(seed: int, *names: str | int) -> int:
    """A seed for one item, choice or retry of a run: stable across machines and versions, below 2**63."""
    text = ":".join(str(name) for name in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise BadSampling(f"{name} is {value!r}; allowed: {allowed}.")


@dataclass(frozen=True)
class History:
    """What stands before a choice, as far as penalties care: the whole text, and how often each token was written."""

    seen: frozenset[int]
    written: Counter[int]

    @staticmethod
    def of(prompt: Items[int], answer: Items[int]) -> History:
        """The history of the token that follows `prompt` + `answer`."""
        return History(frozenset(prompt) | frozenset(answer), Counter(answer))

    def after(self, tokens: Items[int]) -> History:
        """The history once `tokens` have been written too."""
        return History(self.seen | frozenset(tokens), self.written + Counter(tokens))


def constrained(
    logits_NV: Tensor, sampling: SamplingParams, parse: Parse | None, tree: TokenTree, nodes: Items[int]
) -> Tensor:
    """Logits after `nodes` (ROOT = after the text) with the bias added, and -inf where the grammar forbids a token."""
    biases = {token: bias for token, bias in sampling.logit_bias if token < logits_NV.shape[-1]}
    if biases:
        logits_NV = logits_NV.clone()
        logits_NV[:, list(biases)] += logits_NV.new_tensor(list(biases.values()))
    if parse is not None:
        allowed_NV = parse.allowed([tree.spelled(node) for node in nodes], logits_NV.shape[-1])
        logits_NV = logits_NV.where(allowed_NV.to(logits_NV.device), float("-inf"))
    return logits_NV


def penalise(logits_V: Tensor, sampling: SamplingParams, history: History) -> Tensor:
    """Repetition penalty over prompt and answer (Keskar et al. 2019), presence and frequency over the answer.

    A drafter's logits may end before ids that were written.
    """
    if not sampling.penalised:
        return logits_V
    logits_V = logits_V.clone()
    if history.seen and sampling.repetition_penalty != 1:
        seen = [token for token in history.seen if token < logits_V.shape[-1]]
        known = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = known.where(known < 0, known / penalty).where(known >= 0, known * penalty)
    if history.written:
        written = {token: times for token, times in history.written.items() if token < logits_V.shape[-1]}
        tokens, counts = list(written), logits_V.new_tensor(list(written.values()))
        logits_V[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits_V


def restrict(logits_NV: Tensor, sampling: SamplingParams) -> Tensor:
    """Logits with -inf at every token that top-k, top-p or min-p forbids; at least one token stays in each row."""
    if not sampling.filtered or not sampling.temperature:
        return logits_NV  # the most likely token is never forbidden, so T = 0 has nothing to filter
    scaled_NV = logits_NV / sampling.temperature
    forbidden = float("-inf")
    if sampling.top_k:
        kth_N1 = scaled_NV.topk(min(sampling.top_k, scaled_NV.shape[-1])).values[..., -1:]
        scaled_NV = scaled_NV.masked_fill(scaled_NV < kth_N1, forbidden)
    if sampling.nucleus < 1:
        ordered = scaled_NV.sort(dim=-1, stable=True)
        tail_NV = ordered.values.softmax(-1).cumsum(-1) <= 1 - sampling.nucleus
        tail_NV[..., -1] = False
        scaled_NV = scaled_NV.masked_fill(tail_NV.scatter(-1, ordered.indices, tail_NV), forbidden)
    if sampling.min_p:
        probs_NV = scaled_NV.softmax(-1)
        scaled_NV = scaled_NV.masked_fill(probs_NV < sampling.min_p * probs_NV.amax(-1, keepdim=True), forbidden)
    return logits_NV.masked_fill(scaled_NV == forbidden, forbidden)


def at_an_edge(logits_V: Tensor, sampling: SamplingParams, noise: NoiseRows, position: int, unit: float) -> bool:
    """Whether logits that are off by `unit` might let another token win: let in by a filter, or the winner kept out."""
    heat = sampling.temperature or 0.0
    if not sampling.filtered or not heat:
        return False
    free_V = with_noise(logits_V.unsqueeze(0), heat, noise, [position])[0]
    allowed_V = restrict(logits_V.unsqueeze(0), sampling)[0].isfinite()
    best = free_V.masked_fill(~allowed_V, float("-inf")).max()
    decisive = ((free_V >= best - 2 * unit) & logits_V.isfinite()).nonzero()[:, 0]
    if len(decisive) > MOST_DECISIVE:
        return True
    rows = range(len(decisive))
    inside = []
    for way in (2 * unit, -2 * unit):  # each of them raised or lowered by as much as it may stand out from the others
        moved_NV = logits_V.repeat(len(decisive), 1)
        moved_NV[rows, decisive] += way
        top_p, min_p = sampling.nucleus * (1 + way / heat), (sampling.min_p or 0.0) * (1 - way / heat)
        shifted = replace(sampling, top_p=min(max(top_p, 1e-9), 1.0), min_p=min(max(min_p, 0.0), 1.0))
        inside.append(restrict(moved_NV, shifted)[rows, decisive].isfinite())
    return bool((inside[0] != inside[1]).any())


def with_noise(logits_NV: Tensor, temperature: float, noise: NoiseRows, positions: Items[int]) -> Tensor:
    """Scores whose argmax is the choice: row n gets T * G of positions[n]. At T = 0 no noise is ever drawn.

    The noise has the target's ids; a drafter's logits may end before.
    """
    if not temperature:
        return logits_NV
    distinct = sorted(set(positions))
    slot = {position: i for i, position in enumerate(distinct)}
    # Added in place: one matrix less of the size of the logits.
    noise_PV = temperature * noise.rows(distinct)[:, : logits_NV.shape[-1]]
    return noise_PV[[slot[position] for position in positions]].add_(logits_NV)


def compared(logits_V: Tensor, sampling: SamplingParams, history: History, noise: NoiseRows, position: int) -> Tensor:
    """What the choice of the token at `position` compares, [V]: constrained logits, penalised, restricted, + T * G."""
    allowed_NV = restrict(penalise(logits_V, sampling, history).unsqueeze(0), sampling)
    return with_noise(allowed_NV, sampling.temperature or 0.0, noise, [position])[0]
