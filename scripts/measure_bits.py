"""Tokens per sweep of `--drafter substitute` with copies of the target in different numbers of bits.

Prints each against NF4, with 95 % intervals from a bootstrap over prompts. Needs the extra `specexec[hqq]`.

    python scripts/measure_bits.py --every 3
"""

from __future__ import annotations

import click
import numpy as np
from bootstrap import ratio
from measure_trees import prompts

import specexec
from offload.placement.quantized_sizes import BITS, FewBits
from specexec import SamplingParams


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--budget", default=32, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="New tokens for each prompt.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--every", default=1, show_default=True, help="Take only each n-th prompt.")
def main(model: str, budget: int, tokens: int, temperature: str, every: int) -> None:
    """Measure how many tokens one sweep confirms, for each form of the copy."""
    asked = prompts()[::every]
    click.echo("| copy | bits a weight | T | tokens/sweep | against NF4 |\n|---|---|---|---|---|")
    for heat in map(float, temperature.split(",")):
        found: dict[FewBits, np.ndarray] = {}
        for form, bits in BITS.items():
            with specexec.load(
                model, drafter="substitute", drafter_quant=form, budget=budget, offload="disk", dtype="bf16"
            ) as llm:
                answers = [
                    llm.generate(prompt, SamplingParams(temperature=heat, seed=seed, max_tokens=tokens))
                    for seed, prompt in enumerate(asked)
                ]
            rows = found[form] = np.array([(len(answer.tokens), answer.sweeps) for answer in answers], float)
            speed = rows[:, 0].sum() / rows[:, 1].sum()
            click.echo(f"| {form} | {bits} | {heat:g} | {speed:.2f} | {ratio(rows, found['nf4'])} |")


if __name__ == "__main__":
    main()
