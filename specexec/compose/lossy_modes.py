"""What --lossy asks for is put together: which drafters can do it, what plans steps, what of a prompt stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from specexec.drafters.kit import Draft
from specexec.drafters.protocol import Drafter
from specexec.drafters.registry import PAIRED, DrafterChoice, source_of
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import whole
from specexec.errors import BadDrafter, BadOption
from specexec.lossy.asked import Lossy
from specexec.lossy.keys import KeptKeys, last_rows
from specexec.lossy.prompts import ShortPrompts
from specexec.lossy.steps import LEAST, ScoreQuestion, Steps
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import TreeLM
from specexec.text.sequence import Sequence
from specexec.text.tokenizer import Encoding


def able(choice: DrafterChoice, lossy: Lossy, window: int | None) -> DrafterChoice:
    """The sources that do what is asked for; `auto` is then the paired model. Raises BadDrafter for others."""
    if looks := _looks(lossy):
        if window is not None:
            raise BadDrafter(f"--draft-window hides from the drafter what {looks} lets it see.", hint="one of both")
        if not choice.models:
            raise BadDrafter(
                f"{looks} lets a drafter model look at prompts, and none drafts here: {choice.name}.",
                hint="--drafter sibling, or the path or name of a smaller model.",
            )
    if lossy.steps is None:
        return DrafterChoice(choice.sources) if looks else choice
    sources = (PAIRED,) if choice.auto else choice.sources
    if len(sources) != 1 or source_of(sources[0]).kind not in ("model", "copy"):
        raise BadDrafter(
            f"--lossy steps=N lets one model write, which {choice.name} is not.",
            hint="--drafter sibling, the path or name of a smaller model, substitute or skip.",
        )
    return DrafterChoice(sources)


def steps_of(lossy: Lossy, encoding: Encoding, drafter: Drafter, budget: int | Literal["auto"]) -> Steps | None:
    """What plans and judges steps that the drafter writes, if that is asked for. Raises BadDrafter, BadOption."""
    if lossy.steps is None:
        return None
    if not isinstance(drafter, SiblingDrafter) or drafter.reads_its_own:
        raise BadDrafter(
            f"--lossy steps=N needs a drafter that writes alone, in the model's own tokens; {drafter.name} does not.",
            why="A head reads what the model computes, and another vocabulary's guesses are carried over as text.",
            hint="a smaller model of the same family, substitute or skip.",
        )
    question = ScoreQuestion.of(encoding)
    needed = len(question.tokens) + LEAST
    if budget != "auto" and budget < needed:
        raise BadOption(
            f"lossy steps need {needed} guesses in a sweep, for a step and the question about it; the budget is "
            f"{budget}.",
            hint=f"--budget auto, or {needed} and more.",
        )
    return Steps(lossy.steps, question, encoding.decode)


@dataclass(frozen=True)
class OfPrompts:
    """`shorten` says what of a prompt is read, `thin` which of that keep their keys and values (none named: all)."""

    shorten: Callable[[list[int]], list[int]] = list
    thin: Callable[[Sequence], list[int]] = whole


def of_prompts(lossy: Lossy, encoding: Encoding, target: TreeLM | ChainLM, drafts: Iterable[Draft]) -> OfPrompts:
    """What of a prompt stays: all, or what the first drafter model looks at that reads the target's tokens.

    Raises BadDrafter, UnsupportedArchitecture.
    """
    looks = _looks(lossy)
    if not looks:
        return OfPrompts()
    lm = next((one.lm for one in drafts if one.vocabulary.wordings is None), None)
    if lm is None:
        raise BadDrafter(
            f"{looks} lets a drafter model with the model's own tokens choose among those of a prompt.",
            hint="--drafter with a smaller model of the same family.",
        )
    control = {token for token, added in encoding.tokenizer.added_tokens_decoder.items() if added.special}
    shorten = list if lossy.prompt is None else ShortPrompts(lossy.prompt, lm, control).of
    if lossy.kv is None:
        return OfPrompts(shorten)
    assert isinstance(target, TreeLM), "drafts are there"
    keys = KeptKeys(lossy.kv, lm, control, last_rows(target.kinds))

    def checked(tokens: list[int]) -> list[int]:
        read = shorten(tokens)
        keys.check(read)
        return read

    return OfPrompts(checked, keys.of)


def _looks(lossy: Lossy) -> str:
    """Which way needs a drafter that looks at prompts, as it is typed; empty if none does."""
    return "--lossy prompt=X" if lossy.prompt is not None else "--lossy kv=X" if lossy.kv is not None else ""
