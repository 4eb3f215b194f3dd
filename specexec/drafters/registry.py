"""Every drafter by the name that is typed, and how such names are joined: `none`, `auto`, or sources joined by `+`.

A part that is no name of the registry is the path or name of a drafter model: `./small+ngram`. What reads `--drafter`,
makes drafters, completes or lists their names reads this table. Knows no torch: `plan` and `pull` read names too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from specexec.errors import BadDrafter

PAIRED = "sibling"  # the drafter model that a target is paired with


@dataclass(frozen=True)
class Source:
    """One kind of drafter. `maker` is "module:function", imported when it is needed: it is given a DrafterKit."""

    guesses_with: str
    maker: str
    kind: Literal["model", "head", "copy", "text"] = "text"
    """A model of its own, layers that read the target's hidden states, layers of the target, or none of these."""


# In the order in which a union lists them.
REGISTRY: dict[str, Source] = {
    PAIRED: Source("a small model", "specexec.compose.drafter_makers:from_model", "model"),
    "mtp": Source("a layer that came with the target", "specexec.drafters.heads.mtp:make", "head"),
    "substitute": Source("layers of the target in few bits", "specexec.compose.drafter_makers:from_few_bits", "copy"),
    "skip": Source("some layers of the target", "specexec.compose.drafter_makers:from_sublayers", "copy"),
    "ngram": Source("what has been written before", "specexec.drafters.ngram:make"),
}
# What makes a drafter of a folder that holds a head, by its kind.
HEADS = {
    "DFlash": "specexec.drafters.heads.blocks:make",
    "DFlash-2": "specexec.drafters.heads.blocks:make",
    "DSpark": "specexec.drafters.heads.blocks:make",
    "EAGLE-3": "specexec.drafters.heads.eagle:make",
    "EAGLE": "specexec.drafters.heads.eagle:make",
    "P-EAGLE": "specexec.drafters.heads.eagle:make",
    "MTP": "specexec.drafters.heads.mtp_folder:make",
    "Gemma 4 assistant": "specexec.drafters.heads.assistant:make",
    "Medusa": "specexec.drafters.heads.shallow.drafter:make",
    "Hydra": "specexec.drafters.heads.shallow.drafter:make",
    "Hydra++": "specexec.drafters.heads.shallow.drafter:make",
    "MLP speculator": "specexec.drafters.heads.shallow.drafter:make",
    "ReDrafter": "specexec.drafters.heads.shallow.drafter:make",
}
ALONE = {"none": "nothing: plain decoding", "auto": "the fastest of what fits"}  # joined with no others


def names() -> list[str]:
    """Everything that `--drafter` takes beside models."""
    return [*ALONE, *REGISTRY]


@dataclass(frozen=True)
class DrafterChoice:
    """The sources wanted, models first, in the order in which they were typed; nothing is wanted by `none`."""

    sources: tuple[str, ...]
    auto: bool = False

    @property
    def name(self) -> str:
        """As it is typed."""
        return "+".join(self.sources) or "none"

    @property
    def required(self) -> bool:
        """Is a target that takes no guesses to be refused? `auto` then goes without."""
        return bool(self.sources) and not self.auto

    @property
    def models(self) -> tuple[str, ...]:
        """The sources that are drafter models: `sibling`, which is the paired one, paths and names."""
        return tuple(source for source in self.sources if source_of(source).kind == "model")

    @property
    def heads(self) -> tuple[str, ...]:
        """The sources that read the target's hidden states."""
        return tuple(source for source in self.sources if source_of(source).kind == "head")

    @property
    def copies(self) -> tuple[str, ...]:
        """The sources that draft with layers of the target."""
        return tuple(source for source in self.sources if source_of(source).kind == "copy")

    def instead(self, *sources: str) -> DrafterChoice:
        """What `auto` takes where it cannot have its first choice."""
        return DrafterChoice(sources, auto=self.auto)


def source_of(name: str) -> Source:
    """The entry of a name; a path or name of a model is like that of the paired one."""
    return REGISTRY.get(name, REGISTRY[PAIRED])


def parse(text: str, known: Callable[[str], bool]) -> DrafterChoice:
    """Read the value of --drafter; `known` says whether a folder or a short name is called so.

    Raises BadDrafter for what cannot be joined, and for what is nearly the name of a source and nothing else.
    """
    if text == "none":
        return DrafterChoice(())
    if text == "auto":
        return DrafterChoice((PAIRED, "ngram"), auto=True)
    parts = text.split("+")
    if {*ALONE, ""} & set(parts):
        raise BadDrafter(
            f"--drafter {text!r} cannot be joined.",
            hint=f"none, auto, or any of {'+'.join(REGISTRY)} and names of models.",
        )
    if len(set(parts)) < len(parts):
        twice = next(part for part in parts if parts.count(part) > 1)
        raise BadDrafter(f"--drafter {text!r} names {twice} twice.", hint="each of them once.")
    for part in parts:
        if part in REGISTRY or "/" in part or known(part):
            continue
        if near := get_close_matches(part, REGISTRY, n=1, cutoff=0.8):
            raise BadDrafter(
                f"--drafter {part!r} is none of {', '.join(REGISTRY)}.", hint=f"{near[0]}, or ./{part} for a folder."
            )
    models = [part for part in parts if source_of(part).kind == "model"]
    return DrafterChoice((*models, *(name for name in REGISTRY if name in parts and name not in models)))


def check_models(choice: DrafterChoice, folders: Sequence[Path], target: str) -> None:
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
