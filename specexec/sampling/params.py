"""Sampling parameters of a request. Importing it does not import torch; scores.py applies them.

Fields that None leaves to the model are named as in transformers' GenerationConfig, where they are explained; an empty
tuple, and the values named below, switch them off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING

from specexec.errors import BadSampling

if TYPE_CHECKING:
    from specexec.sampling.grammar import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """How to choose and when to stop. Raises BadSampling for a value that a field cannot have.

    None leaves a value to the model (its generation_config.json); a seed is drawn then. Off are top_p and typical_p
    1, the penalties named repetition 1, and any other number 0.

    `logit_bias` holds (token, what to add to its logit). `grammar` (Engine.grammar) is what the answer must look like.
    `stop_token_ids` end an answer beside the model's own ends, also under `ignore_eos`. `min_tokens` is transformers'
    min_new_tokens, and goes before `min_length`, which counts the prompt.
    `logprobs` asks for the natural log-probability of every token, and of so many alternatives; `prompt_logprobs` those
    of the prompt too, which is then computed in full.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    min_tokens: int | None = None
    min_length: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (in_range, allowed) in _NUMBERS.items():
            value = getattr(self, name)
            _require(value is None or in_range(value), name, value, allowed)
        for name in ("ignore_eos", "prompt_logprobs"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name, (settled, allowed) in _LISTS.items():
            if (value := getattr(self, name)) is not None:
                _require((found := settled(value)) is not None, name, value, allowed)
                object.__setattr__(self, name, found)
        _require(not (self.grammar and self.ignore_eos), "ignore_eos", True, "False: a grammar says where a text ends")

    @property
    def penalised(self) -> bool:
        """Whether logits change by what has been written, or by how much: processors.py has something to do."""
        return bool(
            self.repetition_penalty not in (None, 1)
            or self.encoder_repetition_penalty not in (None, 1)
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.encoder_no_repeat_ngram_size
            or self.bad_words_ids
            or self.sequence_bias
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.forced_bos_token_id is not None
            or self.forced_eos_token_id
            or self.exponential_decay_length_penalty
            or self.min_tokens
            or self.min_length
        )

    @property
    def filtered(self) -> bool:
        """Whether some tokens are forbidden whatever the noise says: filters.py has something to do."""
        return bool(self.top_k or self.nucleus < 1 or self.min_p or self.rarely_filtered)

    @property
    def rarely_filtered(self) -> bool:
        """Whether filters do so that few people use."""
        return bool(self.top_h or self.typical_p not in (None, 1) or self.epsilon_cutoff or self.eta_cutoff)

    @property
    def nucleus(self) -> float:
        return 1.0 if self.top_p is None else self.top_p

    @property
    def token_ids(self) -> dict[str, tuple[int, ...]]:
        """The ids in every field that names tokens of the model."""
        one, phrases = self.forced_bos_token_id, [phrase for phrase, _ in self.sequence_bias or ()]
        return {
            "logit_bias": tuple(token for token, _ in self.logit_bias),
            "stop_token_ids": self.stop_token_ids,
            "suppress_tokens": self.suppress_tokens or (),
            "begin_suppress_tokens": self.begin_suppress_tokens or (),
            "forced_bos_token_id": () if one is None else (one,),
            "forced_eos_token_id": self.forced_eos_token_id or (),
            "bad_words_ids": tuple(token for phrase in self.bad_words_ids or () for token in phrase),
            "sequence_bias": tuple(token for phrase in phrases for token in phrase),
        }

    def derived(self, *names: str | int) -> SamplingParams:
        """The same with a seed derived from its own; without one, the same."""
        return self if self.seed is None else replace(self, seed=derived_seed(self.seed, *names))


def derived_seed(seed: int, *names: str | int) -> int:
    """A seed for one item, choice or retry of a run: stable across machines and versions, below 2**63."""
    text = ":".join(str(name) for name in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        shown = repr(value)
        raise BadSampling(f"{name} is {shown if len(shown) < 80 else shown[:76] + ' ...'}; allowed: {allowed}.")


def _real(low: float, high: float = inf, above: bool = False) -> Callable[[object], bool]:
    """Whether a value is a number from `low` (or above it) to `high`."""

    def holds(value: object) -> bool:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and low <= float(value) <= high and not (above and value == low)  # type: ignore[arg-type]

    return holds


def _whole(low: float = -inf) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _each(settle: Callable[[object], object]) -> Callable[[object], tuple[object, ...] | None]:
    """Makes a list (or the pairs of a mapping) a tuple of settled items; None where that cannot be."""

    def settled(value: object) -> tuple[object, ...] | None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            return None
        items = tuple(map(settle, value.items() if isinstance(value, Mapping) else value))
        return None if None in items else items

    return settled


def _token(value: object) -> object:
    return value if _whole(0)(value) else None


def _number_of_token(value: object) -> object:
    return value if _whole()(value) else None  # the model says which there are


def _phrase(value: object) -> object:
    """At least one token id."""
    return _each(_token)(value) or None


def _pair(of: Callable[[object], object], low: float, high: float) -> Callable[[object], object]:
    """Something and a number."""

    def settled(value: object) -> object:
        both = tuple(value) if isinstance(value, Iterable) else ()
        if len(both) != 2 or of(both[0]) is None or not _real(low, high)(both[1]):
            return None
        return of(both[0]), both[1]

    return settled


def _texts(value: object) -> tuple[object, ...] | None:
    texts = [value] if isinstance(value, str) else value
    return _each(lambda text: text if isinstance(text, str) and text else None)(texts)


def _tokens(value: object) -> tuple[object, ...] | None:
    return _each(_token)([value] if _whole(0)(value) else value)


_POSITIVE = (_real(0, above=True), "above 0; 1 is off")
_SHARE = (_real(0, 1), "0 (off) to 1")
_COUNT = (_whole(0), "0 (off) or more")
_SIGNED = (_real(-2, 2), "-2 to 2")
# The fields that hold a number, whether it will do, and what would.
_NUMBERS: dict[str, tuple[Callable[[object], bool], str]] = {
    "temperature": (lambda value: _real(0)(value) and value < 100, "0 to 100"),  # type: ignore[operator]
    "top_k": _COUNT,
    "top_p": (_real(0, 1, above=True), "above 0, up to 1 (off)"),
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "presence_penalty": _SIGNED,
    "frequency_penalty": _SIGNED,
    "max_tokens": (_whole(0), "0 or more"),
    "seed": (_whole(), "a whole number"),
    "logprobs": (_whole(0), "0 or more"),
    "min_tokens": _COUNT,
    "min_length": _COUNT,
    "top_h": _SHARE,
    "typical_p": (_real(0, 1, above=True), "above 0, up to 1 (off)"),
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "encoder_repetition_penalty": _POSITIVE,
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "forced_bos_token_id": (_whole(0), "a token id"),
}
# The fields that hold several things, what makes tuples of them, and what they may be.
_TOKENS = (_tokens, "token ids")
_LISTS: dict[str, tuple[Callable[[object], object], str]] = {
    "stop": (_texts, "non-empty texts"),
    "logit_bias": (_each(_pair(_number_of_token, -100, 100)), "pairs of a token id and -100 to 100"),
    "stop_token_ids": _TOKENS,
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "forced_eos_token_id": _TOKENS,
    "bad_words_ids": (_each(_phrase), "lists of token ids, none of them empty"),
    "sequence_bias": (_each(_pair(_phrase, -inf, inf)), "pairs of a list of token ids and a number"),
    "exponential_decay_length_penalty": (_pair(_token, 0, inf), "a number of tokens and a factor"),
}
