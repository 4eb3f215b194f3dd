"""Milliseconds of a linear with 16-bit weights: torch's own kernel, and ours for CPUs without 16-bit arithmetic, block
after block and with a thread pool that shares them.

python scripts/measure_widened.py --shape 8192,2048 --threads 2
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median

import click
import torch
from timing import timed
from torch.nn.functional import linear

import offload
from specexec.model.linears import float32_linears as widened

WEIGHTS = 6  # more than a cache holds


@click.command()
@click.option("--shape", default="8192,2048", show_default=True, help="Outputs and inputs.")
@click.option("--rows", default="16,64,256", show_default=True, help="Comma list.")
@click.option("--threads", default=1, show_default=True)
@click.option("--repeat", default=12, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
def main(shape: str, rows: str, threads: int, repeat: int, dtype: str) -> None:
    """They take turns; medians."""
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    outputs, inputs = map(int, shape.split(","))
    weights = cycle([torch.randn(outputs, inputs).to(kind) for _ in range(WEIGHTS)])
    pays = "pays" if widened.pays(torch.device("cpu"), kind) else "is not used"
    click.echo(f"{dtype}, {outputs} × {inputs}, {threads} threads; widening {pays} on this CPU\n")
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "torch": linear,
        "widened": widened.linear,
        "with a thread pool": partial(widened.linear, share=offload.share),
    }
    click.echo("| rows | torch | widened | with a thread pool | torch / thread pool |\n|--:|--:|--:|--:|--:|")
    for count in map(int, rows.split(",")):
        rows_RI = torch.randn(count, inputs).to(kind)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            weight_OI = next(weights)
            for name, way in ways.items():
                took[name].append(timed(partial(way, rows_RI, weight_OI)))
        theirs, alone, shared = (median(each) for each in took.values())
        click.echo(f"| {count} | {theirs * 1e3:.1f} | {alone * 1e3:.1f} | {shared * 1e3:.1f} | {theirs / shared:.2f} |")


if __name__ == "__main__":
    main()
