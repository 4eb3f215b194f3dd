"""One prompt of a run: what it is called, what it asks, how it wants to be answered. Knows no file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from cli.errors import BadJsonl
from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams, derived_seed

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Prompt: TypeAlias = str | list[dict[str, str]]

WHOLE = ("top_k", "max_tokens", "seed")
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
OVERRIDES = (*WHOLE, *REAL, "stop", "ignore_eos")


@dataclass(frozen=True)
class Item:
    """One prompt to answer, or the reason why it cannot be. `wishes` replace the run's own sampling.

    `duplicate_of` is the id of the first item that asks the very same, if one answer shall serve both.
    """

    id: str
    prompt: Prompt = ""
    wishes: Mapping[str, object] = field(default_factory=dict)
    problem: SpecexecError | None = None
    index: int = 0
    duplicate_of: str | None = None

    @property
    def prompt_sha(self) -> str:
        """Changes with anything that could change the answer and is the item's own."""
        asked = json.dumps([self.prompt, dict(sorted(self.wishes.items()))], ensure_ascii=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def sampling(self, run: SamplingParams) -> SamplingParams:
        """How to answer: the run's choice, a seed of the item's own, and on top what the item wishes.

        The seed belongs to the item, so that its text depends on no other item and no order.
        """
        seed = derived_seed(run.seed or 0, self.duplicate_of or self.id)
        return replace(run, **{"seed": seed, **self.wishes})  # type: ignore[arg-type]  # wishes_of has checked


def wishes_of(record: Mapping[str, Json], place: str) -> dict[str, object]:
    """The sampling parameters that a record sets for itself, checked."""
    wishes = {name: _checked(name, record[name], place) for name in OVERRIDES if record.get(name) is not None}
    SamplingParams(**wishes)  # type: ignore[arg-type]  # checked above; here the ranges are
    return wishes


def _checked(name: str, value: Json, place: str) -> object:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in WHOLE and number and value == int(value):  # type: ignore[arg-type]  # a number
        return int(value)
    if name in REAL and number:
        return float(value)  # type: ignore[arg-type]
    if name == "ignore_eos" and isinstance(value, bool):
        return value
    if name == "stop":
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) and is_text(text) for text in texts):
            return tuple(str(text) for text in texts)
    raise BadJsonl(f"{place}: field {name!r} cannot be {json.dumps(value)[:40]}.")


def is_text(text: str) -> bool:
    """Whether it can be written down: JSON may spell half characters that no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
