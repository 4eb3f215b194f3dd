"""The one way to an engine: options in, a running Engine out, with progress while it loads and a summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from cli.engine.imports import lean_imports
from cli.engine.learned_store import learning, measured, searching
from cli.engine.ngram_store import recalling
from cli.shared.options import EngineOptions
from cli.shared.quantities import format_count
from cli.shared.template_options import set_template
from cli.shared.verbosity import Verbosity, start_logging
from cli.terminal.screen import Screen
from offload.hub.names import is_here
from specexec.compose.earlier_runs import EarlierRuns
from specexec.compose.progress import LoadProgress

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

ENOUGH = 8  # sweeps, or tokens that plain decoding would have written, before anything is said of it
UNSURE = 0.9  # below this share of a speed of another day, or of few sweeps, something is said: machines vary
TOY = (
    "{name}: a toy built in to show the engine, not for answers. A real model: specexec chat -m llama-70b --offload ram"
)


def open_engine(options: EngineOptions, progress: LoadProgress | None = None, planner: str = "best") -> Engine:
    """Load what the options ask for, with what earlier runs found out; `planner` is for `bench` to compare.

    Tests put a fake engine here.
    """
    is_here(options.model)  # a name that means no model is refused before the engine's libraries take their seconds
    with lean_imports():
        from specexec.compose.load import assemble

    drafter = options.load.drafter
    earlier = EarlierRuns(measured(options) if drafter == "auto" else {})
    with searching(options, earlier.searches) if "skip" in drafter.split("+") else nullcontext():
        engine = assemble(options.model, options.load, progress or LoadProgress(), earlier, planner)
    set_template(engine.encoding, options.template_vars, options.allow_control_tokens)
    return engine


@contextmanager
def running_engine(
    options: EngineOptions, screen: Screen, verbosity: Verbosity, remember: bool = True, planner: str = "best"
) -> Iterator[Engine]:
    """An engine for the length of the block, announced on stderr before anything else happens.

    Measurements do not `remember`: they neither begin with what earlier runs knew nor leave anything behind.
    """
    start_logging(verbosity, screen.tell)
    so_far = ""

    def searched(done: int, of: int) -> None:
        nonlocal so_far
        so_far = f" {done} of at most {of} sets of sublayers tried; done once"

    def quantised(done: int, of: int) -> None:
        nonlocal so_far
        so_far = f" {done} of {of} layers quantised to draft"

    with screen.status(lambda: f"starting {options.model}…{so_far}"):
        engine = open_engine(options, progress=LoadProgress(quantised=quantised, searched=searched), planner=planner)
    with ExitStack() as stack:
        stack.enter_context(engine)
        if remember:
            if _must_pay(engine):
                engine.accounting.sample_plain()
            stack.enter_context(remembering(engine, options))
        for line in introduction(engine):
            screen.say(line)
        yield engine
        if remember and (loss := losing(engine, measured(options).get("none"))) is not None:
            screen.say(loss)


@contextmanager
def remembering(engine: Engine, options: EngineOptions) -> Iterator[None]:
    """For the length of the block the engine knows what earlier runs knew; what it learns is kept."""
    if options.prefix_cache and engine.models:
        from cli.engine.prefix_store import PrefixStore

        engine.prefixes = PrefixStore.of(engine)
    with recalling(engine), learning(engine, options):
        yield


def losing(engine: Engine, plain_before: float | None = None) -> str | None:
    """A word if guessing did not pay for itself. `plain_before`: tokens/s of plain decoding in earlier runs here."""
    pace, would = engine.accounting.pace, engine.accounting.pace.plain_tokens
    if not _must_pay(engine):
        return None
    instead = "" if engine.budget == "auto" else "--budget auto guesses as much as pays, "
    written, sure = pace.together.tokens, 0.98 if pace.plain.sweeps >= 4 else UNSURE
    if would is not None and would >= ENOUGH and written < sure * would:
        return (
            f"once the prompt was read, guessing made {pace.together.tokens_per_s:.3g} tokens/s, plain decoding about "
            f"{would / pace.together.seconds:.3g} here: {instead}--drafter none is faster."
        )
    if pace.at_least >= ENOUGH and written < 0.98 * pace.at_least:
        return (
            "guessing took longer than it saved, plain decoding is at least "
            f"{pace.at_least / written:.2g} times as fast here: --drafter none is faster."
        )
    made = pace.alone.tokens_per_s
    if would is None and plain_before and pace.alone.sweeps >= ENOUGH and made < UNSURE * plain_before:
        return (
            f"guessing made {made:.3g} tokens/s, plain decoding made {plain_before:.3g} "
            "in earlier runs here: --drafter none may be faster."
        )
    if pace.plain.sweeps >= 4 and 2 * pace.plain.sweeps > pace.together.sweeps:
        return (
            f"once the prompt was read, {pace.plain.sweeps} of {pace.together.sweeps} sweeps carried no guesses: "
            "they would not have paid."
        )
    return None


def _must_pay(engine: Engine) -> bool:
    """Whether guesses are made to save time; a toy shows how they work."""
    return not (engine.toy or engine.sources == "none" or engine.budget == 0)


def introduction(engine: Engine) -> list[str]:
    """Which model will answer, who drafts, and where the weights are."""
    why = f" (auto: {engine.reason})" if engine.reason else ""
    facts = [
        f"drafter {engine.drafter_name}{why}",
        engine.device,
        f"budget {engine.budget}",
        f"context {format_count(engine.context)}",
        engine.placement,
        *(["computed by the model's own code"] if engine.own_code else []),
        *([f"computes in {engine.compute}"] if engine.compute != "float" else []),
        *([f"KV in {engine.kv_quant} bits"] if engine.kv_quant else []),
        *(f"LoRA {one}" for one in engine.adapters["target"]),
        *(f"LOSSY {one}" for one in engine.lossy),
    ]
    if engine.toy:
        return [TOY.format(name=engine.name), " · ".join(facts)]
    return [" · ".join([engine.name, *facts])]
