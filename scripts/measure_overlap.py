"""Draft time that decoding waits for, with and without guessing ahead while the weights stream.

The built-in pair (or another) over a link so slow that a sweep waits for it. Every prompt is answered twice in a row,
without and with overlap. A hit: the text went where a next tree had grown meanwhile.
Prints seconds of drafting before a sweep (median), the hit rate, what overlap saves on hits and in all, and what a run
with overlap alone estimates of the latter (`Overlap.hidden`); first sweeps, which read the prompt, are left out. Texts
must be equal.

    python scripts/measure_overlap.py --link-limit 20e6 --temperature 0,0.8
"""

from __future__ import annotations

import click
import numpy as np
from measure_trees import prompts
from tqdm import tqdm

import specexec
from cli.shared.options import BUDGET, IntOrAuto
from specexec import SamplingParams
from specexec.stats import Overlap


def middle(seconds: np.ndarray) -> str:
    """The median, if there is one."""
    return f"{np.median(seconds):.3f}" if len(seconds) else "–"


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--drafter", default="sibling", show_default=True)
@click.option("--link-limit", default=20e6, show_default=True, help="Bytes per second.")
@click.option("--budget", type=BUDGET, default="64", show_default=True, help="Nodes, or auto.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--tokens", default=32, show_default=True)
@click.option("--count", default=44, show_default=True, help="Prompts.")
def main(
    model: str, drafter: str, link_limit: float, budget: IntOrAuto, temperature: str, tokens: int, count: int
) -> None:
    """Measure what overlap hides."""
    asked = prompts(count)
    with specexec.load(
        model, drafter=drafter, offload="ram", link_limit_Bps=link_limit, dtype="f32",
        budget=budget,
    ) as llm:  # fmt: skip
        click.echo(f"{len(asked)} prompts, {tokens} tokens each, budget {budget}, {link_limit:g} B/s\n")
        click.echo("| T | drafter | s of a sweep | s of drafting, serial | on hits | on misses | hits | saved on hits "
                   "| saved in all | as reported | same texts |")  # fmt: skip
        click.echo("|---|---|---|---|---|---|---|---|---|---|---|")
        for warmth in (float(part) for part in temperature.split(",")):
            drafted: dict[bool, list[float]] = {False: [], True: []}
            texts: dict[bool, list[list[int]]] = {False: [], True: []}
            hits: list[bool] = []
            overlap = Overlap()
            swept: list[float] = []
            for number, prompt in enumerate(tqdm(asked, leave=False, disable=None)):
                for ahead in (False, True):
                    llm._decoder.overlap = ahead
                    sampling = SamplingParams(temperature=warmth, seed=100 + number, max_tokens=tokens)
                    bursts = list(llm.stream(prompt, sampling))
                    texts[ahead].append([token for burst in bursts for token in burst.tokens])
                    drafted[ahead] += [burst.cost.draft_s for burst in bursts[1:]]
                    swept += [burst.cost.sweep_s for burst in bursts[1:]]
                    if ahead:
                        hits += [bool(burst.hit) for burst in bursts[:-1]]
                        overlap = sum((burst.overlap for burst in bursts[1:]), overlap)
            serial, overlapped, hit = np.array(drafted[False]), np.array(drafted[True]), np.array(hits, bool)
            on_hits, on_misses = overlapped[hit], overlapped[~hit]
            cells = (
                f"{warmth:g}", drafter, middle(np.array(swept)), middle(serial), middle(on_hits), middle(on_misses),
                f"{hit.mean():.0%}", f"{1 - np.median(on_hits) / np.median(serial):.0%}" if hit.any() else "–",
                f"{1 - overlapped.sum() / serial.sum():.0%}", f"{overlap.hidden:.0%}",
                f"{sum(a == b for a, b in zip(*texts.values(), strict=True))} of {len(asked)}",
            )  # fmt: skip
            click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
