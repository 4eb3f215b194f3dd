"""Tokens per second of 1, 4, 16, … prompts that share sweeps, with trees and without, on one streamed model.

    python scripts/measure_batch.py --link-limit 5MB/s --sizes 1,4,16,32

Every row answers the same prompts with the same seeds. `plain` is batched decoding of one token a sweep and text: what
sharing sweeps gives without trees. The link limit stands in for a model that is large beside the machine's arithmetic.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import click

import specexec
from cli.options import SPEED
from specexec.engine import Engine
from specexec.sampling import SamplingParams, derived_seed
from specexec.stats import Completion
from specexec.work import Prompt

PROMPTS = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True)
class Row:
    """One run over `size` prompts."""

    size: int
    trees: bool
    tokens: int
    sweeps: int
    nodes: int
    seconds: float
    texts: dict[int, tuple[int, ...]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(llm: Engine, prompts: list[Prompt], sampling: SamplingParams, trees: int | str) -> Row:
    """All prompts at once, each with a seed of its own."""
    llm.budget = trees  # type: ignore[assignment]  # a number or auto
    requests = [
        specexec.Request(
            index,
            prompt,
            SamplingParams(
                temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=derived_seed(1, index),
                ignore_eos=True,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    began = time.perf_counter()
    batch = llm.batch(requests, len(prompts))
    answers = [result for result in batch if isinstance(result, Completion)]
    seconds = time.perf_counter() - began
    assert len(answers) == len(prompts)
    tokens, nodes = sum(len(answer.tokens) for answer in answers), sum(answer.nodes for answer in answers)
    texts = {answer.index: answer.tokens for answer in answers}
    return Row(len(prompts), trees != 0, tokens, batch.sweeps, nodes, seconds, texts)


@click.command()
@click.option("-m", "--model", default="demo", show_default=True)
@click.option("-d", "--drafter", default="auto", show_default=True)
@click.option("--dtype", default="f32", show_default=True)
@click.option("--offload", default="disk", show_default=True)
@click.option("--link-limit", type=SPEED, help="Slow the weight stream down, such as 5MB/s.")
@click.option("--sizes", default="1,4,16,32", show_default=True, help="Numbers of prompts.")
@click.option("--budget", default="auto", show_default=True, help="Nodes for each text, or auto.")
@click.option("-n", "--max-tokens", default=64, show_default=True)
@click.option("-t", "--temperature", default=0.0, show_default=True)
@click.option("--plain/--no-plain", default=True, show_default=True, help="Measure decoding without trees too.")
def main(
    model: str, drafter: str, dtype: str, offload: str, link_limit: float | None, sizes: str, budget: str,
    max_tokens: int, temperature: float, plain: bool,
) -> None:  # fmt: skip
    """Print one line for each number of prompts, with and without trees."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts: list[Prompt] = [
        [{"role": "user", "content": line["prompt"]}] if line["chat"] else line["prompt"] for line in lines
    ]
    random.Random(0).shuffle(prompts)  # every size gets a mixture of both kinds
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with specexec.load(
        model, drafter=drafter, dtype=dtype, offload=offload, link_limit_Bps=link_limit  # type: ignore[arg-type]
    ) as llm:  # fmt: skip
        run(llm, prompts[:2], SamplingParams(max_tokens=8), "auto")  # first touches, and the first costs learned
        click.echo(
            f"{llm.name} · {llm.placement} · {os.cpu_count()} cores · T = {temperature} · {max_tokens} tokens each"
        )
        click.echo("| prompts | trees | tok/s | × one with trees | tok/sweep | nodes/text | s/sweep |")
        click.echo("|--------:|-------|------:|-----------------:|----------:|-----------:|--------:|")
        single = 0.0
        for size in map(int, sizes.split(",")):
            chosen = list(islice(cycle(prompts), size))
            row = run(llm, chosen, sampling, "auto" if budget == "auto" else int(budget))
            single = single or row.rate
            show(row, single)
            if plain:
                without = run(llm, chosen, sampling, 0)
                show(without, single)
                assert without.texts == row.texts, "trees must not change a text"


def show(row: Row, single: float) -> None:
    name = "yes" if row.trees else "plain"
    click.echo(
        f"| {row.size} | {name} | {row.rate:.1f} | {row.rate / single:.2f} | {row.tokens / row.sweeps:.1f} | "
        f"{row.nodes / row.sweeps / row.size:.1f} | {row.seconds / row.sweeps:.2f} |"
    )


if __name__ == "__main__":
    main()
