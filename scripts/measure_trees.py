"""Tokens per sweep of the demo pair: budgets x temperatures x shared noise on, off, the reference rule, with look-ups.

Every prompt of prompts.jsonl, 64 new tokens each, first sweep included; the text of every row must equal that of plain
decoding with the same seed, or the script says so. Every cell starts with nothing learned; what was written is looked
up within a prompt only. Prints a markdown table: tokens / sweeps of all prompts together, and its 95 % interval from a
bootstrap over prompts; then the ratio to the reference rule.

    python scripts/measure_trees.py --budget 8,32,128,512 --temperature 0,0.7,1.0
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from bootstrap import interval, ratio
from tqdm import tqdm

import specexec
from specexec import SamplingParams
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine.engine import Engine
from specexec.planning.best_first import PLANNERS, RANKINGS
from specexec.stats import Completion
from specexec.text.messages import Prompt

PROMPTS = Path(__file__).with_name("prompts.jsonl")
REFERENCE = "reference rule"


@dataclass(frozen=True)
class Rule:
    """How a tree is chosen, and from what."""

    planner: str = "best"
    ranking: Ranking = RANKINGS["best"]
    source: str = "sibling"


RULES = {
    "shared noise": Rule(),
    "no shared noise": Rule(ranking=replace(RANKINGS["best"], shared_noise=False)),
    REFERENCE: Rule("reference", RANKINGS["reference"]),
    "shared noise, look-ups": Rule(source="sibling+ngram"),
}


def prompts(limit: int | None = None) -> list[str | list[dict[str, str]]]:
    """The prompts as text, or as a chat of one message; of them at most `limit`, spread over the list."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    rows = rows if limit is None else rows[:: max(len(rows) // limit, 1)][:limit]
    return [[{"role": "user", "content": row["prompt"]}] if row["chat"] else row["prompt"] for row in rows]


def in_turn(asked: Items[Prompt], temperature: float, tokens: int) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Each prompt with a seed of its own."""
    for seed, prompt in enumerate(tqdm(asked, disable=None)):
        yield prompt, SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens)


def use(llm: Engine, rule: Rule) -> Memory:
    """From now on the engine guesses so, over its loaded models, with nothing learned yet. Gives what it looks up."""
    memory = Memory()
    members: dict[str, Drafter] = {
        "sibling": SiblingDrafter(llm._drafts["drafter"], len(llm.tokenizer), rule.ranking),
        "ngram": NgramDrafter(memory),
    }
    wanted = [members[name] for name in rule.source.split("+")]
    llm._decoder.drafter = wanted[0] if len(wanted) == 1 else Union(wanted)
    llm._decoder.planner = PLANNERS[rule.planner]
    return memory


def answers_of(
    llm: Engine, rule: Rule, asked: Items[Prompt], samplings: Items[SamplingParams], what: str, session: bool = False
) -> list[Completion]:
    """What the engine writes for every prompt, with nothing left to look up from those before unless in one session."""
    memory, answers = use(llm, rule), []
    for pair in tqdm(list(zip(asked, samplings, strict=True)), desc=what, leave=False, disable=None):
        answers.append(llm.generate(*pair))
        if not session:
            memory.forget_past()
    return answers


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
            for name in rules or RULES:
                counts, equal = measured.setdefault(name, []), 0
                for nodes in budgets:
                    llm.budget = nodes
                    answers = answers_of(llm, RULES[name], asked, sampling, f"{name} T={warmth} B={nodes}")
                    equal += sum(answer.tokens == text for answer, text in zip(answers, plain, strict=True))
                    counts.append(np.array([[len(one.tokens), one.sweeps] for one in answers]))
                row = " | ".join(map(interval, counts))
                click.echo(f"| {name} | {warmth:g} | {row} | {equal} of {len(budgets) * len(asked)} |")
            reference = measured.pop(REFERENCE, None)
            if reference is not None:
                for name, counts in measured.items():
                    row = " | ".join(map(ratio, counts, reference))
                    click.echo(f"| {name} / reference | {warmth:g} | {row} | |")


if __name__ == "__main__":
    main()
