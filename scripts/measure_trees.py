"""Tokens per sweep of the demo pair: budgets x temperatures x shared noise on, off, and the reference rule.

Every prompt of prompts.jsonl, 64 new tokens each, first sweep included; the text of every row must equal that of plain
decoding with the same seed, or the script says so. Prints a markdown table: tokens / sweeps of all prompts together,
and its 95 % interval from a bootstrap over prompts.

    python scripts/measure_trees.py --budget 8,32,128,512 --temperature 0,0.7,1.0
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from bootstrap import interval, ratio
from tqdm import tqdm

import specexec
from specexec import SamplingParams
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine import Engine
from specexec.planner import PLANNERS, RANKINGS
from specexec.ranking import Ranking

PROMPTS = Path(__file__).with_name("prompts.jsonl")
RULES = {
    "shared noise": ("best", RANKINGS["best"]),
    "no shared noise": ("best", replace(RANKINGS["best"], shared_noise=False)),
    "reference rule": ("reference", RANKINGS["reference"]),
}


def prompts() -> list[str | list[dict[str, str]]]:
    """The prompts as text, or as a chat of one message."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [[{"role": "user", "content": row["prompt"]}] if row["chat"] else row["prompt"] for row in rows]


def use(llm: Engine, planner: str, ranking: Ranking) -> None:
    """Switch planner and ranking of a running engine: a comparison of rules on the same loaded models."""
    drafter = llm._decoder.drafter
    assert isinstance(drafter, SiblingDrafter)
    drafter.ranking = ranking
    llm._decoder.planner = PLANNERS[planner]


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--drafter", default="sibling", show_default=True)
@click.option("--budget", default="8,32,128,512", show_default=True, help="Comma list.")
@click.option("--temperature", default="0,0.7,1.0", show_default=True, help="Comma list.")
@click.option("--tokens", default=64, show_default=True, help="New tokens for each prompt.")
@click.option("--every", default=1, show_default=True, help="Take only each n-th prompt.")
@click.option("--dtype", default="f32", show_default=True)
@click.option(
    "--rule", "rules", type=click.Choice(list(RULES)), multiple=True, help="Only these; at T = 0 noise is none."
)
def main(
    model: str, drafter: str, budget: str, temperature: str, tokens: int, every: int, dtype: str, rules: tuple[str, ...]
) -> None:
    """Measure how many tokens one sweep confirms, for each rule, budget and temperature."""
    budgets = [int(part) for part in budget.split(",")]
    temperatures = [float(part) for part in temperature.split(",")]
    asked = prompts()[::every]
    click.echo(f"{len(asked)} prompts, {tokens} tokens each, {model} with drafter {drafter}, {dtype}\n")
    click.echo("| rule | T | " + " | ".join(f"budget {nodes}" for nodes in budgets) + " | texts equal to plain |")
    click.echo("|---|---|" + "---|" * (len(budgets) + 1))
    with specexec.load(model, drafter=drafter, offload="none", dtype=dtype) as llm:
        for warmth in temperatures:
            sampling = [SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(len(asked))]
            llm.budget = 0
            plain = [llm.generate(*pair).tokens for pair in zip(asked, sampling, strict=True)]
            measured: dict[str, list[np.ndarray]] = {}
            for rule in rules or RULES:
                planner, ranking = RULES[rule]
                use(llm, planner, ranking)
                counts, equal = measured.setdefault(rule, []), 0
                for nodes in budgets:
                    llm.budget = nodes
                    pairs = tqdm(
                        list(zip(asked, sampling, strict=True)), desc=f"{rule} T={warmth} B={nodes}", leave=False
                    )
                    answers = [llm.generate(*pair) for pair in pairs]
                    equal += sum(answer.tokens == text for answer, text in zip(answers, plain, strict=True))
                    counts.append(np.array([[len(one.tokens), one.sweeps] for one in answers]))
                row = " | ".join(map(interval, counts))
                click.echo(f"| {rule} | {warmth:g} | {row} | {equal} of {len(budgets) * len(asked)} |")
            if {"shared noise", "reference rule"} <= measured.keys():
                row = " | ".join(map(ratio, measured["shared noise"], measured["reference rule"]))
                click.echo(f"| shared noise / reference | {warmth:g} | {row} | |")


if __name__ == "__main__":
    main()
