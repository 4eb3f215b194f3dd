"""A model's sampling defaults, used where the user set none: its generation_config.json. Knows no model itself."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from transformers import GenerationConfig

from specexec.errors import BadSampling
from specexec.sampling.params import SamplingParams

# Fields of SamplingParams that are the caller's alone; how long an answer may become is one of them.
_CALLERS = {
    "presence_penalty", "frequency_penalty", "max_tokens", "seed", "ignore_eos", "logit_bias", "grammar", "logprobs",
    "prompt_logprobs", "stop_token_ids",
}  # fmt: skip
_THEIR_NAMES = {"min_tokens": "min_new_tokens", "stop": "stop_strings"}
_OFF = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=())

# What `generate` obeys and we ignore, and the values with which it changes nothing.
_IGNORED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0.0,), "penalty_alpha": (0.0,), "dola_layers": (),
    "constraints": (), "force_words_ids": (), "guidance_scale": (1.0,), "watermarking_config": (),
    "token_healing": (False,), "remove_invalid_values": (False,), "max_time": (), "use_mtp": (False,),
    "prompt_lookup_num_tokens": (), "assistant_early_exit": (), "assistant_ensemble_weight": (), "speculation_type": (),
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """A model's defaults: how to choose, and the ids that end a text. `ignored`: those without effect, a line each."""

    sampling: SamplingParams
    stop_tokens: frozenset[int]
    ignored: tuple[str, ...] = ()

    def filled(self, sampling: SamplingParams) -> SamplingParams:
        """Every None replaced by the model's default; the seed by 32 random bits."""
        wanted = {one.name: getattr(self.sampling, one.name) for one in fields(SamplingParams)}
        wanted["seed"] = secrets.randbits(32)
        return replace(sampling, **{name: value for name, value in wanted.items() if getattr(sampling, name) is None})


def defaults_of(config: GenerationConfig | None, *others: object, rows: int | None = None) -> Defaults:
    """Read a generation_config.json; `others` are further ids that end a text, such as the tokenizer's own.

    Of its ids, those that an embedding of so many rows does not have are left out.
    """
    config = config or GenerationConfig()
    sampling, ignored = _OFF, []
    for name in [one.name for one in fields(SamplingParams) if one.name not in _CALLERS]:
        value = getattr(config, _THEIR_NAMES.get(name, name), None)
        if value is None or (name == "temperature" and not config.do_sample):
            continue
        try:
            sampling = replace(sampling, **{name: value})
        except BadSampling as problem:
            ignored.append(f"generation_config.json: {problem.what} It is left out.")
    if rows is not None:
        sampling, left_out = _within(sampling, rows)
        ignored += left_out
    if config.do_sample and config.temperature is None:
        sampling = replace(sampling, temperature=1.0)
    named = [
        f"{name}={value}"
        for name, neutral in _IGNORED.items()
        if (value := getattr(config, name, None)) is not None and value not in neutral
    ]
    if named:
        ignored.append(f"generation_config.json: {', '.join(named)} is not followed; answers are written without it.")
    return Defaults(sampling, stop_tokens(config.eos_token_id, *others), tuple(ignored))


def _within(sampling: SamplingParams, rows: int) -> tuple[SamplingParams, list[str]]:
    """Without the ids that the model does not have and the phrases that hold one; and what was left out, said once."""
    beyond = {
        name: tokens[0]
        for name, ids in sampling.token_ids.items()
        if (tokens := [token for token in ids if token >= rows])
    }
    if not beyond:
        return sampling, []
    kept = {name: _known(getattr(sampling, name), rows) for name in beyond}
    named = ", ".join(f"{name} names token {token}" for name, token in beyond.items())
    why = f"this model has 0 to {rows - 1}. What it does not have is left out."
    return replace(sampling, **kept), [f"generation_config.json: {named}; {why}"]  # type: ignore[arg-type]


def _known(value: object, rows: int) -> object:
    """An id or None; or of ids, phrases, or phrases with a number, those that the model has."""
    if isinstance(value, Iterable):
        return tuple(item for item in value if max(_phrase(item)) < rows)
    return value if isinstance(value, int) and value < rows else None


def _phrase(item: object) -> tuple[int, ...]:
    if not isinstance(item, tuple):
        return (item,)  # type: ignore[return-value]  # one id
    return item[0] if isinstance(item[0], tuple) else item


def stop_tokens(*named: object) -> frozenset[int]:
    """Ids that end a text; each of `named` is one, several or none."""
    every = [token for ids in named for token in (ids if isinstance(ids, Iterable) else [ids])]
    return frozenset(token for token in every if isinstance(token, int) and token >= 0)
