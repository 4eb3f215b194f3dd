"""Tokens per sweep by source of guesses: sibling, ngram, sibling+ngram, on ordinary prompts and on copy-heavy ones.

Ordinary: every prompt of prompts.jsonl. Copy-heavy: the same, asked a second time below the target's own first answer,
as in editing, quoting and answering from a document; and those among them whose plain text really copies: half of it
or more lies in runs of eight tokens that stood before. Every source starts with nothing learned, and forgets what it
wrote between prompts unless --session; texts must equal plain decoding with the same seed. Prints tokens / sweeps of
all prompts together and the ratio to the sibling alone, with a 95 % interval from a bootstrap over the same prompts.

    python scripts/measure_sources.py --budget 64 --temperature 0,0.8
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import click
import numpy as np
from bootstrap import ratio
from measure_trees import Rule, answers_of, prompts

import specexec
from specexec import SamplingParams
from specexec.engine.engine import Engine
from specexec.text.messages import Prompt

SOURCES = ("sibling", "ngram", "sibling+ngram")
RUN, HALF = 8, 0.5


def copy_heavy(llm: Engine, prompt: Prompt, tokens: int) -> list[int]:
    """The prompt, the target's greedy answer, and the prompt once more."""
    asked = llm.encode(prompt)
    answer = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=tokens)).tokens
    return [*asked, *answer, *asked]


def copied(asked: list[int], answer: Items[int]) -> float:
    """The share of the answer that lies in runs of RUN tokens that occur somewhere before them."""
    text, inside = [*asked, *answer], np.zeros(len(answer), bool)
    seen: set[tuple[int, ...]] = set()
    for end in range(RUN, len(text) + 1):
        run = tuple(text[end - RUN : end])
        if run in seen and end > len(asked):
            inside[max(end - RUN - len(asked), 0) : end - len(asked)] = True
        seen.add(run)
    return float(inside.mean()) if len(answer) else 0.0


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """What is measured: a pair of models, the size of trees and how tokens are drawn."""
    options = (
        click.option("--model", default="demo", show_default=True),
        click.option("--drafter", default="sibling", show_default=True, help="The model that drafts."),
        click.option("--budget", default=64, show_default=True),
        click.option("--temperature", default="0,0.8", show_default=True, help="Comma list."),
        click.option("--dtype", default="f32", show_default=True),
    )
    for option in reversed(options):  # as decorators one below the other
        command = option(command)
    return command


@click.command()
@source_options
@click.option("--tokens", default=64, show_default=True, help="New tokens for each prompt.")
@click.option("--session", is_flag=True, help="Remember from prompt to prompt.")
def main(model: str, drafter: str, budget: int, temperature: str, tokens: int, dtype: str, session: bool) -> None:
    """Measure what each source adds."""
    with specexec.load(model, drafter=drafter, offload="none", dtype=dtype, budget=budget) as llm:
        ordinary: list[Prompt] = [*prompts()]
        copying: list[Prompt] = [copy_heavy(llm, prompt, tokens) for prompt in ordinary]
        click.echo(f"{len(ordinary)} prompts, {tokens} tokens each, budget {budget}, {model}, {dtype}\n")
        click.echo("| prompts | T | source | tokens per sweep | ratio to sibling | texts equal to plain |")
        click.echo("|---|---|---|---|---|---|")
        for warmth in (float(part) for part in temperature.split(",")):
            samplings = [
                SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(len(ordinary))
            ]
            for name, asked in (("ordinary", ordinary), ("copy-heavy", copying)):
                llm.budget = 0
                plain = [llm.generate(*pair) for pair in zip(asked, samplings, strict=True)]
                llm.budget = budget
                shares = np.array(
                    [copied(llm.encode(one), text.tokens) for one, text in zip(asked, plain, strict=True)]
                )
                click.echo(f"| {name} | {warmth:g} | copied: {shares.mean():.0%} of the text | | | |")
                groups = {name: shares >= 0, f"{name}, {(shares >= HALF).sum()} that copy": shares >= HALF}
                base: np.ndarray | None = None
                for source in SOURCES:
                    answers = answers_of(llm, Rule(source=source), asked, samplings, source, session)
                    rows = np.array([[len(one.tokens), one.sweeps] for one in answers])
                    base = rows if base is None else base
                    equal = np.array([one.tokens == text.tokens for one, text in zip(answers, plain, strict=True)])
                    for group, of in groups.items():
                        if of.sum() > 1:
                            speed = f"{rows[of, 0].sum() / rows[of, 1].sum():.2f}"
                            same = f"{equal[of].sum()} of {of.sum()}"
                            cells = (group, f"{warmth:g}", source, speed, ratio(rows[of], base[of]), same)
                            click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
