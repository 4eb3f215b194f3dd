"""Does `--budget auto` find the best fixed budget? Tokens per second, paired over the prompts.

Every prompt is answered with each fixed budget and with auto, one after the other, so that a slow minute of the machine
hits all of them. Prints tokens/s, tokens/sweep and the seconds of drafting that decoding waited for; the last line is
auto against the best fixed budget with a 95 % bootstrap interval over prompts. `--link-limit` makes the toy stream like
a large model; `--serial` turns off guessing while the weights move. `--charge` runs the real models on a clock of its
own, on which everything costs what it says: the choice of the budget alone, whatever else the machine is doing.

    python scripts/measure_budget.py --link-limit 20MB/s --budget 8,32,64,128,256
    python scripts/measure_budget.py --charge 0.2,0.01,0.0005,0.006,0.0001 --budget 8,32,128,512
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import click
import numpy as np
from bootstrap import rate, ratio
from measure_trees import in_turn, prompts

import offload.placement.placement as weights
import specexec
from cli.shared.quantities import parse_speed_Bps
from specexec import SamplingParams
from specexec.drafters.protocol import Ask, Guesses
from specexec.engine.engine import Engine
from specexec.engine.step_accounting import StillMeter
from specexec.model.tree_lm import Rows, Sweep
from specexec.planning import best_first as planner
from specexec.text.messages import Prompt

Budget = int | Literal["auto"]


@dataclass(frozen=True)
class Ran:
    """One answer."""

    tokens: int
    sweeps: int
    draft_s: float
    seconds: float


@dataclass
class Charged:
    """A clock on which a sweep of n rows lasts max(stream, a + b n) seconds, a drafter pass over n nodes c + d n."""

    stream_s: float
    sweep_s: float
    row_s: float
    pass_s: float
    node_s: float
    now_s: float = 0.0
    waited_s: float = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def take_over(self, llm: Engine) -> None:
        """From now on everything that the engine does takes the time it is charged, one thing after the other."""
        setattr(planner, "time", self)  # noqa: B010 - a stand-in for a module
        llm.accounting.clock = self.perf_counter
        within = llm._decoder
        target, drafter = within.target, within.drafter
        begin: Callable[[list[Rows]], Sweep] = target.begin
        guess: Callable[[list[Ask], int], list[Guesses]] = drafter.guess

        def charged_begin(parts: list[Rows]) -> Sweep:
            computing_s = self.sweep_s + self.row_s * sum(len(part.tokens) for part in parts)
            self.now_s += max(self.stream_s, computing_s)
            self.waited_s += max(self.stream_s - computing_s, 0.0)
            return begin(parts)

        def charged_guess(asks: list[Ask], width: int) -> list[Guesses]:
            self.now_s += self.pass_s + self.node_s * sum(len(ask.nodes) for ask in asks)
            return guess(asks, width)

        setattr(target, "begin", charged_begin)  # noqa: B010
        setattr(drafter, "guess", charged_guess)  # noqa: B010
        llm.accounting._meter = lambda: StillMeter(wait_s=self.waited_s)
        within.overlap = False


def answer(llm: Engine, prompt: Prompt, budget: Budget, sampling: SamplingParams, now: Callable[[], float]) -> Ran:
    """One prompt under one budget."""
    llm.budget = budget
    began = now()
    bursts = list(llm.stream(prompt, sampling))
    tokens = sum(len(burst.tokens) for burst in bursts)
    return Ran(tokens, len(bursts), sum(burst.draft_s for burst in bursts), now() - began)


def took(runs: list[Ran]) -> np.ndarray:
    """Tokens and seconds of each answer."""
    return np.array([[run.tokens, run.seconds] for run in runs])


@click.command()
@click.option("--budget", default="8,32,64,128,256", show_default=True, help="Comma list of fixed budgets.")
@click.option("--link-limit", default=None, help="Such as 20MB/s; none = layers resident in RAM.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--limit", default=44, show_default=True, help="Prompts to use, spread over the list.")
@click.option("--serial", is_flag=True, help="Do not guess while the weights move.")
@click.option(
    "--charge",
    metavar="STREAM,SWEEP,ROW,PASS,NODE",
    help="Seconds: streaming; a sweep and each of its rows; a drafter pass and each of its nodes.",
)
def main(
    budget: str,
    link_limit: str | None,
    temperature: float,
    tokens: int,
    limit: int,
    serial: bool,
    charge: str | None,
) -> None:
    """Compare the automatic budget with fixed ones."""
    asked = prompts(limit)
    budgets: list[Budget] = [*(int(part) for part in budget.split(",")), "auto"]
    runs: dict[Budget, list[Ran]] = defaultdict(list)
    limit_Bps = None if link_limit is None else parse_speed_Bps(link_limit)
    clock = None if charge is None else Charged(*(float(part) for part in charge.split(",")))
    now = time.perf_counter if clock is None else clock.perf_counter
    where: weights.Offload = "none" if limit_Bps is None else "disk"
    # Not `auto`: it would look up the answers that the budgets before wrote.
    with specexec.load("demo", drafter="sibling", offload=where, link_limit_Bps=limit_Bps) as llm:
        llm._decoder.overlap = False if serial else None
        if clock is not None:
            clock.take_over(llm)
        answer(llm, asked[0], 32, SamplingParams(max_tokens=8), now)
        for prompt, sampling in in_turn(asked, temperature, tokens):
            for one in budgets:
                runs[one].append(answer(llm, prompt, one, sampling, now))
    click.echo("| budget | tokens/s | tokens/sweep | waited for drafts, s per sweep |\n|---|---|---|---|")
    for one in budgets:
        sweeps = sum(run.sweeps for run in runs[one])
        click.echo(
            f"| {one} | {rate(took(runs[one]))[0]:.2f} | {sum(run.tokens for run in runs[one]) / sweeps:.2f} "
            f"| {sum(run.draft_s for run in runs[one]) / sweeps:.4f} |"
        )
    best = max(budgets[:-1], key=lambda one: rate(took(runs[one]))[0])
    click.echo(f"\nauto / best fixed ({best}): {ratio(took(runs['auto']), took(runs[best]))}")


if __name__ == "__main__":
    main()
