"""What a model wishes where the user has said nothing: its generation_config.json. Knows no model itself."""

from __future__ import annotations

import secrets
from dataclasses import replace

from transformers import GenerationConfig

from specexec.sampling import SamplingParams


def filled(sampling: SamplingParams, wish: GenerationConfig | None) -> SamplingParams:
    """Every None replaced by what the model wants, or by chance."""
    greedy = not getattr(wish, "do_sample", False)
    wanted = {
        "temperature": 0.0 if greedy else _or(getattr(wish, "temperature", None), 1.0),
        "top_k": 0 if greedy else _or(getattr(wish, "top_k", None), 0),
        "top_p": 1.0 if greedy else _or(getattr(wish, "top_p", None), 1.0),
        "min_p": 0.0 if greedy else _or(getattr(wish, "min_p", None), 0.0),
        "seed": secrets.randbits(32),
    }
    missing = {name: value for name, value in wanted.items() if getattr(sampling, name) is None}
    return replace(sampling, **missing)  # type: ignore[arg-type]  # each value has the type of its field


def stop_tokens(wish: GenerationConfig | None, of_tokenizer: object) -> frozenset[int]:
    """Ids that end a text: one or several of the model's, and the tokenizer's own."""
    ids = getattr(wish, "eos_token_id", None)
    from_model = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return frozenset(from_model + ([of_tokenizer] if isinstance(of_tokenizer, int) else []))


def _or(value: object, default: object) -> object:
    return default if value is None else value
