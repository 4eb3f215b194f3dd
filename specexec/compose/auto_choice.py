"""Which drafters `--drafter auto` takes: of those that fit, the fastest that was measured. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from functools import partial

from offload import EXPERTS, Free, OffloadError, copy_B, mtp_B, need_in, place
from specexec.compose.memory_plan import LoadRequest, need_with
from specexec.drafters.registry import PAIRED, DrafterChoice


def picked(
    request: LoadRequest, choice: DrafterChoice, free: Free, speeds: Mapping[str, float]
) -> tuple[DrafterChoice, str]:
    """What was asked for, as asked; or of what fits the drafters that `auto` takes, and why.

    `speeds`: tokens per second that drafters, by name, have made with this target here.
    """
    if not choice.auto:
        return choice, ""
    if request.plainly:
        return choice.instead(), f"plain decoding, since {request.plainly}"
    paired = bool(request.drafters)
    brought = bool(mtp_B(request.target, request.item_B(request.target)))
    found = candidates(paired, partial(_slowest, request, free), _copies_may_pay(request, speeds), brought)
    return fastest(found, paired, speeds)


def candidates(
    paired: bool, slowest: Callable[[DrafterChoice], str | None], copies: bool, brought: bool = False
) -> list[DrafterChoice]:
    """What `auto` may take, the best guess first; what has been written before is always there.

    `slowest` says where the slowest of the target's layers lives beside a choice, None if the two do not fit;
    `copies`: the target's layers can be quantised, and it might pay; `brought`: a layer came with it to guess further.
    """
    alone = DrafterChoice(("ngram",), auto=True)
    found = [alone.instead(PAIRED, "ngram")] if paired else []
    if brought:
        found.append(alone.instead("mtp", "ngram"))
    if copies and slowest(alone) != "none":  # a resident target drafts for itself at its own pace
        found.append(alone.instead("substitute", "ngram"))
    return [*(choice for choice in found if slowest(choice) is not None), alone]


def fastest(found: Items[DrafterChoice], paired: bool, measured: Mapping[str, float]) -> tuple[DrafterChoice, str]:
    """The one to use, and why. The first is used until it is measured, in tokens per second; then the fastest is."""
    known = [choice for choice in found if choice.name in measured]
    if len(known) > 1 and found[0] in known:
        best = max(known, key=lambda choice: measured[choice.name])
        speeds = ", ".join(f"{choice.name} {measured[choice.name]:.3g}" for choice in known)
        others = " and ".join(choice.name for choice in found if choice not in known)
        return best, f"tokens/s here: {speeds}" + (f"; not measured: {others}" if others else "")
    if found[0].models:
        return found[0], "the paired model and what was written before"
    missing = "its drafter does not fit beside it" if paired else "no drafter is paired with it, or not here yet"
    if found[0].heads:
        return found[0], f"{missing}; a layer that guesses further ahead came with it"
    if "substitute" in found[0].sources:
        return found[0], f"{missing}; a 4-bit copy of it fits"
    return found[0], f"{missing}: guessing from what was written before"


def _slowest(request: LoadRequest, free: Free, choice: DrafterChoice) -> str | None:
    try:
        return place(need_with(request, choice), free, request.options.offload, request.options.kv).offload
    except OffloadError:
        return None


def _copies_may_pay(request: LoadRequest, speeds: Mapping[str, float]) -> bool:
    """Not among experts; and what streams in few bits already gains nothing by a copy."""
    # A CPU takes longer over a 4-bit copy than over the weights themselves: there it must have been measured first.
    if any(request.target.config.get(name) for name in EXPERTS) or (
        request.on_cpu and "substitute+ngram" not in speeds
    ):
        return False
    number_B = request.item_B(request.target)
    streamed_B = sum(need_in(request.target, request.form, number_B, request.context).read_B)
    return 4 * copy_B(request.target, request.copy, number_B)[0] <= 3 * streamed_B
