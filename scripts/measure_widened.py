"""Milliseconds of a linear with 16-bit weights: torch's own kernel, and ours for CPUs without 16-bit arithmetic.

python scripts/measure_widened.py --shape 8192,2048 --threads 1
"""

from __future__ import annotations

from itertools import cycle
from statistics import median

import click
import torch
from timing import timed
from torch.nn.functional import linear

from specexec import widened

WEIGHTS = 6  # more than a cache holds


@click.command()
@click.option("--shape", default="8192,2048", show_default=True, help="Outputs and inputs.")
@click.option("--rows", default="16,64,256", show_default=True, help="Comma list.")
@click.option("--threads", default=1, show_default=True)
@click.option("--repeat", default=12, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
def main(shape: str, rows: str, threads: int, repeat: int, dtype: str) -> None:
    """Both take turns; medians."""
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    outputs, inputs = map(int, shape.split(","))
    weights = cycle([torch.randn(outputs, inputs).to(kind) for _ in range(WEIGHTS)])
    pays = "pays" if widened.pays(torch.device("cpu"), kind) else "is not used"
    click.echo(f"{dtype}, {outputs} × {inputs}, {threads} threads; widening {pays} on this CPU\n")
    click.echo("| rows | torch | widened | torch / widened |\n|--:|--:|--:|--:|")
    for count in map(int, rows.split(",")):
        rows_RI = torch.randn(count, inputs).to(kind)
        took: dict[str, list[float]] = {"torch": [], "widened": []}
        for _ in range(repeat):
            weight_OI = next(weights)
            took["torch"].append(timed(lambda: linear(rows_RI, weight_OI)))  # noqa: B023 - called at once
            took["widened"].append(timed(lambda: widened.linear(rows_RI, weight_OI)))  # noqa: B023
        theirs, ours = median(took["torch"]), median(took["widened"])
        click.echo(f"| {count} | {theirs * 1e3:.1f} | {ours * 1e3:.1f} | {theirs / ours:.2f} |")


if __name__ == "__main__":
    main()
