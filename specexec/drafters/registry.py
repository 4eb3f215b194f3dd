"""What people call drafters: `none`, `auto`, or sources joined by `+`. The one place where these names are read.

A part that is no source is the path or name of a drafter model: `./small+ngram`. Knows no torch: `plan` and `pull` read
names too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from specexec.errors import BadDrafter

PAIRED = "sibling"  # the drafter model that a target is paired with
ALONE = ("substitute", "skip", "ngram")  # need no other model; in the order in which a union lists them
SOURCES = (PAIRED, *ALONE)


@dataclass(frozen=True)
class Choice:
    """The sources wanted, models first, in the order in which they were typed; nothing is wanted by `none`."""

    sources: tuple[str, ...]
    auto: bool = False

    @property
    def name(self) -> str:
        """As it is typed."""
        return "+".join(self.sources) or "none"

    @property
    def models(self) -> tuple[str, ...]:
        """The sources that are drafter models: `sibling`, which is the paired one, paths and names."""
        return tuple(source for source in self.sources if source not in ALONE)

    def instead(self, *sources: str) -> Choice:
        """What `auto` takes where it cannot have its first choice."""
        return Choice(sources, auto=self.auto)


def parse(text: str, known: Callable[[str], bool]) -> Choice:
    """Read the value of --drafter; `known` says whether a folder or a short name is called so.

    Raises BadDrafter for what cannot be joined, and for what is nearly the name of a source and nothing else.
    """
    if text == "none":
        return Choice(())
    if text == "auto":
        return Choice((PAIRED, "ngram"), auto=True)
    parts = text.split("+")
    if {"none", "auto", ""} & set(parts):
        raise BadDrafter(
            f"--drafter {text!r} cannot be joined.",
            hint=f"none, auto, or any of {'+'.join(SOURCES)} and names of models.",
        )
    if len(set(parts)) < len(parts):
        twice = next(part for part in parts if parts.count(part) > 1)
        raise BadDrafter(f"--drafter {text!r} names {twice} twice.", hint="each of them once.")
    for part in parts:
        if part in SOURCES or "/" in part or known(part):
            continue
        if near := get_close_matches(part, SOURCES, n=1, cutoff=0.8):
            raise BadDrafter(
                f"--drafter {part!r} is none of {', '.join(SOURCES)}.", hint=f"{near[0]}, or ./{part} for a folder."
            )
    models = [part for part in parts if part not in ALONE]
    return Choice((*models, *(source for source in ALONE if source in parts)))


def check_models(choice: Choice, folders: Sequence[Path], target: str) -> None:
    """Raises BadDrafter where no drafter is paired with `target` but asked for by name, and for one that has two names.

    `folders` are those of the choice's models, in their order; that of a pair may be missing.
    """
    if len(folders) < len(choice.models) and not choice.auto:
        raise BadDrafter(
            f"no drafter is paired with {target!r}, or it is not on this machine yet.",
            hint="--drafter ngram, or the path or name of a smaller model of the same family.",
        )
    named: dict[Path, str] = {}
    for model, folder in zip(choice.models, folders, strict=False):
        other = named.setdefault(folder.resolve(), model)
        if other != model:
            raise BadDrafter(
                f"--drafter {choice.name!r} names one model twice: {other} and {model} are both {folder}.",
                hint="one of the two names, or another model.",
            )
