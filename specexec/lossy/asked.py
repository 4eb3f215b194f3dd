"""What may change a text, as it is typed: `steps=7`, `prompt=0.25`, `kv=0.5`. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from specexec.errors import BadOption

BEST = 9  # of the scores of a step, which begin with 0


@dataclass(frozen=True)
class Lossy:
    """`steps`: the score from which a step that the drafter wrote becomes text (steps.py). `prompt`: the share of a
    long prompt that the target reads (prompts.py). `kv`: the share of a long prompt's keys and values that it keeps
    (keys.py). None: the text is the target's own, and of its whole prompt.
    """

    steps: float | None = None
    prompt: float | None = None
    kv: float | None = None

    @classmethod
    def of(cls, typed: Iterable[str]) -> Lossy:
        """Read what was typed. Raises BadOption.

        >>> Lossy.of(["steps=7"])
        Lossy(steps=7.0, prompt=None, kv=None)
        """
        found: dict[str, float] = {}
        for one in typed:
            name, _, value = one.partition("=")
            number = _number(value)
            fits = {
                "steps": 0 <= number <= BEST or number == math.inf,
                "prompt": 0 < number < 1,
                "kv": 0 < number <= 1,
            }
            if not fits.get(name) or name in found:
                raise BadOption(
                    f"lossy is {one!r}; allowed: steps=N, the least score of a step, 0 to {BEST} or inf, prompt=X, "
                    "the share of a long prompt that is read, above 0 and below 1, and kv=X, the share of its keys and "
                    "values that is kept, above 0 and up to 1; each once."
                )
            found[name] = number
        return cls(**found)

    @property
    def labels(self) -> tuple[str, ...]:
        """It as it is typed, for every place that names the text's origin."""
        given = (("steps", self.steps), ("prompt", self.prompt), ("kv", self.kv))
        return tuple(f"{name}={value:g}" for name, value in given if value is not None)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
