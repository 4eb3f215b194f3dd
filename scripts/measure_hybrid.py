"""A hybrid pair: tokens a sweep and a second with trees against plain decoding, resident and streamed.

Every prompt with each budget in turn, so that a slow minute hits all alike; budget 0 is plain decoding. All texts must
be equal, in both places. Prints a markdown table; the last column is against plain decoding in the same place,
with a 95 % bootstrap interval over prompts.

    python scripts/hybrid_pair.py build/hybrid
    python scripts/measure_hybrid.py build/hybrid/target build/hybrid/drafter --link-limit 20MB/s
"""

from __future__ import annotations

import time

import click
import numpy as np
from bootstrap import interval, rate, ratio
from measure_budget import Budget
from measure_trees import in_turn, prompts

import specexec
from cli.shared.quantities import parse_speed_Bps
from offload.placement.placement import Offload
from specexec import SamplingParams

BUDGETS: tuple[Budget, ...] = (0, 8, 32, 128, "auto")


@click.command()
@click.argument("target")
@click.argument("drafter")
@click.option("--link-limit", default="20MB/s", show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--tokens", default=48, show_default=True, help="New tokens for each prompt.")
@click.option("--every", default=4, show_default=True, help="Take only each n-th prompt.")
def main(target: str, drafter: str, link_limit: str, temperature: float, tokens: int, every: int) -> None:
    """Measure what trees are worth to a hybrid pair."""
    asked = prompts()[::every]
    click.echo(f"{len(asked)} prompts, {tokens} tokens each, T = {temperature:g}, f32, link {link_limit}\n")
    click.echo("| layers | budget | tokens a sweep | tokens/s | against plain |\n|---|---|---|---|---|")
    written: list[tuple[int, ...]] = []
    places: tuple[tuple[Offload, float | None], ...] = (("none", None), ("disk", parse_speed_Bps(link_limit)))
    for where, limit_Bps in places:
        found: dict[Budget, list[list[float]]] = {budget: [] for budget in BUDGETS}
        with specexec.load(
            target, drafter=drafter, offload=where, link_limit_Bps=limit_Bps, dtype="f32", budget=8
        ) as llm:
            llm.generate(asked[0], SamplingParams(max_tokens=8))
            for index, (one, sampling) in enumerate(in_turn(asked, temperature, tokens)):
                for budget in BUDGETS:
                    llm.budget = budget
                    began_s = time.perf_counter()
                    answer = llm.generate(one, sampling)
                    seconds = time.perf_counter() - began_s
                    found[budget].append([len(answer.tokens), answer.sweeps, seconds])
                    if len(written) == index:
                        written.append(answer.tokens)
                    assert answer.tokens == written[index], f"prompt {index}, budget {budget}: another text"
        runs = {budget: np.array(rows) for budget, rows in found.items()}
        for budget, rows_P3 in runs.items():
            click.echo(
                f"| {'streamed' if limit_Bps else 'resident'} | {budget or 'plain'} | {interval(rows_P3[:, [0, 1]])} "
                f"| {rate(rows_P3[:, [0, 2]])[0]:.1f} | {ratio(rows_P3[:, [0, 2]], runs[0][:, [0, 2]])} |"
            )


if __name__ == "__main__":
    main()
