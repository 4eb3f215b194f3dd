"""What people call drafters: `none`, `auto`, or sources joined by `+`. The one place where these names are read.

A part that is no source is the path or name of a drafter model: `./small+ngram`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from specexec.cost import CostModel
from specexec.drafters import Drafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.union import Union
from specexec.errors import BadDrafter

SOURCES = ("sibling", "substitute", "skip", "ngram")  # in the order in which a union lists them


@dataclass(frozen=True)
class Choice:
    """The sources wanted; nothing is wanted by `none`. `model` names the sibling, if it was named."""

    sources: tuple[str, ...]
    model: str | None = None
    auto: bool = False

    @property
    def name(self) -> str:
        """As it is typed."""
        return (
            "+".join(self.model if source == "sibling" and self.model else source for source in self.sources) or "none"
        )

    @property
    def pairing(self) -> str:
        """What offload's `resolve` shall look for: "none", "auto" (the paired sibling), or a name."""
        return "none" if "sibling" not in self.sources else self.model or "auto"

    def instead(self, *sources: str) -> Choice:
        """What `auto` takes where it cannot have its first choice."""
        return Choice(sources, auto=self.auto)


def parse(text: str) -> Choice:
    """Read the value of --drafter. Raises BadDrafter for what cannot be joined."""
    if text == "none":
        return Choice(())
    if text == "auto":
        return Choice(("sibling", "ngram"), auto=True)
    parts = text.split("+")
    named = [part for part in parts if part not in SOURCES]
    if {"none", "auto", ""} & set(parts):
        raise BadDrafter(f"--drafter {text!r} cannot be joined.", hint=f"none, auto, or any of {'+'.join(SOURCES)}.")
    for part in named:
        if "/" not in part and (near := get_close_matches(part, SOURCES, n=1, cutoff=0.8)):
            raise BadDrafter(
                f"--drafter {part!r} is none of {', '.join(SOURCES)}.", hint=f"{near[0]}, or ./{part} for a folder."
            )
    if len(named) > 1 or (named and "sibling" in parts):
        raise BadDrafter(
            f"--drafter {text!r} names {len(named) + ('sibling' in parts)} drafter models; one can draft at a time.",
            hint=f"one of them, joined by any of {', '.join(SOURCES[1:])}.",
        )
    wanted = {*parts, *(["sibling"] if named else [])}
    return Choice(tuple(source for source in SOURCES if source in wanted), named[0] if named else None)


def join(choice: Choice, makers: Mapping[str, Callable[[], Drafter]], cost: CostModel) -> Drafter:
    """The drafter that was chosen; each source is made by its maker, several share the tree by what they cost."""
    members = [makers[source]() for source in choice.sources]
    if not members:
        return NoDrafter()
    return members[0] if len(members) == 1 else Union(members, cost)
