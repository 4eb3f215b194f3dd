"""A training on the screen: how far it is, how long it will take, how good it has become. Ctrl-C ends it."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cli.terminal.interrupts import Interrupts
from cli.terminal.screen import Screen

if TYPE_CHECKING:
    from specexec.distill.training import Trained

REPORT_EVERY_S = 30.0
SURE = 3  # steps after which a time is said


@dataclass
class TrainingCourse:
    """What came of a training. `accepted`: at its first and at its last look."""

    steps: int = 0
    done: int = 0
    loss: float | None = None
    before: float | None = None
    accepted: float | None = None
    seconds: float = 0.0
    exit_code: int = 0


def follow(steps: Generator[Trained, None, None], screen: Screen) -> TrainingCourse:
    """Run a training to its end, or to the first Ctrl-C; it says now and then how many guesses in a row are right."""
    seen = TrainingCourse()
    began_s, here, said = time.perf_counter(), 0, False

    def line() -> str:
        if here < SURE:
            return "reading the texts…" if not seen.steps else f"step {seen.done} of {seen.steps}"
        left_s = (time.perf_counter() - began_s) / here * (seen.steps - seen.done)
        return f"step {seen.done} of {seen.steps}, loss {seen.loss:.3f}, about {left_s / 60:.0f} min left"

    with (
        Interrupts(lambda: None, lambda: screen.tell("stopping after this step…")) as interrupts,
        screen.status(line, plain_every_s=REPORT_EVERY_S),
    ):
        for one in steps:
            here += one.step > seen.done
            seen.steps, seen.done, seen.seconds = one.steps, one.step, time.perf_counter() - began_s
            if one.step:
                seen.loss = one.loss
            if one.accepted is not None:
                seen.before = one.accepted if seen.before is None else seen.before
                seen.accepted = one.accepted
                screen.say(f"step {one.step} of {one.steps}: {one.accepted:.2f} guesses in a row are right")
            if here == SURE and not said:
                said = True
                screen.say(f"{one.steps - one.step} steps to do, about {_minutes(seen.seconds / here, one)} min")
            if interrupts.exit_code and one.step < one.steps:
                seen.exit_code = interrupts.exit_code
                break
    steps.close()
    return seen


def _minutes(step_s: float, one: Trained) -> str:
    return f"{step_s * (one.steps - one.step) / 60:.2g}"
