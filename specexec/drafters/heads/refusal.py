"""What a head has to fit, and what is said of one that cannot be used. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from specexec.errors import BadDrafter


@dataclass(frozen=True)
class TargetShape:
    """What a head has to fit."""

    layers: int
    hidden: int
    vocabulary: int


def unread(kind: str, name: str, why: str) -> BadDrafter:
    """A head of a kind that is known, in a form that is not."""
    return BadDrafter(
        f"the {kind} head {name} is of a kind that is not read yet: {why}.",
        hint="--drafter ngram, mtp where the model brings it, or a smaller model of the same family.",
    )


def of_another(kind: str, name: str, given: object, ours: object, words: str) -> BadDrafter:
    """A head whose sizes are those of another model."""
    return BadDrafter(
        f"{name} is a head ({kind}) for a model with {given} {words}, this one has {ours}.",
        hint="the head of this model, --drafter ngram, or a smaller model of the same family.",
    )
