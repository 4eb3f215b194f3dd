"""Tokens per second of 1, 4, 16, … prompts that share sweeps, with trees and without, on one streamed model.

    python scripts/measure_batch.py --link-limit 5MB/s --sizes 1,4,16,32
    python scripts/measure_batch.py --charge 1.4,0.05,0.0006,0.03,0.002 --sizes 1,32 --turns 3 --natural
    python scripts/measure_batch.py -m INFLATED_1B -d offload/demo/drafter --dtype bf16 --sizes 1,4,16,32,64

Every row answers the same prompts with the same seeds. `plain` is batched decoding of one token a sweep and text: what
sharing sweeps gives without trees. The link limit simulates a model that is large beside the machine's arithmetic;
`--charge` runs the models on a clock of its own (see measure_budget.py), whatever else the machine is doing.

With one turn all texts begin together, and the last sweeps carry only those that are hardest to guess; with more turns
places are taken again as they become free. Not `--drafter auto`: it would look up what the rows before wrote.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import click
from measure_budget import Charged

import specexec
from cli.shared.options import SPEED
from specexec.engine.decoder import Step
from specexec.engine.engine import Engine
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.stats import Completion
from specexec.text.messages import Prompt

PROMPTS = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True)
class Row:
    """One run over `size` prompts."""

    size: int
    trees: bool
    tokens: int
    sweeps: int
    text_sweeps: int
    nodes: int
    draft_s: float
    wait_s: float
    seconds: float
    texts: dict[int, tuple[int, ...]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Costs:
    """Seconds of all sweeps so far: drafting before them, and waiting for weights in them."""

    draft_s: float = 0.0
    wait_s: float = 0.0

    def watch(self, llm: Engine) -> None:
        """Add up what every step of the engine costs."""
        step = llm._decoder.step

        def watched() -> list[Step]:
            steps = step()
            if steps:
                self.draft_s += steps[0].burst.cost.draft_s
                self.wait_s += steps[0].burst.cost.wait_s
            return steps

        setattr(llm._decoder, "step", watched)  # noqa: B010


def run(
    llm: Engine, prompts: list[Prompt], parallel: int, sampling: SamplingParams, trees: int | Literal["auto"],
    costs: Costs, now: Callable[[], float],
) -> Row:  # fmt: skip
    """All prompts, `parallel` at a time, each with a seed of its own."""
    llm.budget = trees
    requests = [
        specexec.Request(index, prompt, replace(sampling, seed=derived_seed(1, index)))
        for index, prompt in enumerate(prompts)
    ]
    began, draft_s, wait_s = now(), costs.draft_s, costs.wait_s
    batch = llm.batch(requests, parallel)
    answers = [result for result in batch if isinstance(result, Completion)]
    assert len(answers) == len(prompts)
    return Row(
        size=parallel,
        trees=trees != 0,
        tokens=sum(len(answer.tokens) for answer in answers),
        sweeps=batch.sweeps,
        text_sweeps=sum(answer.sweeps for answer in answers),
        nodes=sum(answer.nodes for answer in answers),
        draft_s=costs.draft_s - draft_s,
        wait_s=costs.wait_s - wait_s,
        seconds=now() - began,
        texts={answer.index: answer.tokens for answer in answers},
    )


@click.command()
@click.option("-m", "--model", default="demo", show_default=True)
@click.option("-d", "--drafter", default="sibling", show_default=True)
@click.option("--dtype", default="f32", show_default=True)
@click.option("--offload", default="disk", show_default=True)
@click.option("--link-limit", type=SPEED, help="Slow the weight stream down, such as 5MB/s.")
@click.option("--sizes", default="1,4,16,32", show_default=True, help="Numbers of prompts.")
@click.option("--budget", default="auto", show_default=True, help="Nodes for each text, or auto.")
@click.option("-n", "--max-tokens", default=64, show_default=True)
@click.option("-t", "--temperature", default=0.0, show_default=True)
@click.option("--turns", default=1, show_default=True, help="Prompts that every place answers on average.")
@click.option("--natural", is_flag=True, help="End where the model ends; else every answer has full length.")
@click.option("--plain/--no-plain", default=True, show_default=True, help="Measure decoding without trees too.")
@click.option("--charge", metavar="STREAM,SWEEP,ROW,PASS,NODE", help="Seconds, as in measure_budget.py.")
def main(
    model: str, drafter: str, dtype: str, offload: str, link_limit: float | None, sizes: str, budget: str,
    max_tokens: int, temperature: float, turns: int, natural: bool, plain: bool, charge: str | None,
) -> None:  # fmt: skip
    """Print one line for each number of prompts, with and without trees."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts: list[Prompt] = [
        [{"role": "user", "content": line["prompt"]}] if line["chat"] else line["prompt"] for line in lines
    ]
    random.Random(0).shuffle(prompts)  # every size gets a mixture of both kinds
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=not natural)
    clock = None if charge is None else Charged(*(float(part) for part in charge.split(",")))
    now, costs = time.perf_counter if clock is None else clock.perf_counter, Costs()
    with specexec.load(
        model, drafter=drafter, dtype=dtype, offload="none" if clock else offload,
        link_limit_Bps=link_limit,
    ) as llm:  # fmt: skip
        if clock is not None:
            clock.take_over(llm)
        costs.watch(llm)
        # First touches, and the first costs learned.
        run(llm, prompts[:2], 2, replace(sampling, max_tokens=8), "auto", costs, now)
        click.echo(
            f"{llm.name} · {'charged ' + charge if charge else llm.placement} · {os.cpu_count()} cores · "
            f"T = {temperature} · {max_tokens} tokens at most · {turns} turns"
        )
        click.echo(
            "| prompts at a time | trees | tok/s | × one with trees | sweeps | tok/sweep and text | nodes/text | "
            "drafting s | waiting s | rest s |\n|--:|--|--:|--:|--:|--:|--:|--:|--:|--:|"
        )
        single = 0.0
        for size in map(int, sizes.split(",")):
            chosen = list(islice(cycle(prompts), size * turns))
            row = run(llm, chosen, size, sampling, "auto" if budget == "auto" else int(budget), costs, now)
            single = single or row.rate
            show(row, single)
            if plain:
                without = run(llm, chosen, size, sampling, 0, costs, now)
                show(without, single)
                assert without.texts == row.texts, "trees must not change a text"


def show(row: Row, single: float) -> None:
    name = "yes" if row.trees else "plain"
    rest_s = row.seconds - row.draft_s - row.wait_s
    click.echo(
        f"| {row.size} | {name} | {row.rate:.1f} | {row.rate / single:.2f} | {row.sweeps} | "
        f"{row.tokens / row.text_sweeps:.2f} | {row.nodes / row.text_sweeps:.1f} | "
        f"{row.draft_s:.1f} | {row.wait_s:.1f} | {rest_s:.1f} |"
    )


if __name__ == "__main__":
    main()
