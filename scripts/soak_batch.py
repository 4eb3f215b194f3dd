"""Answer a thousand prompts and show what the process holds meanwhile: nothing may grow with the number of items.

python scripts/soak_batch.py --items 1000
"""

from __future__ import annotations

import gc
import sys
import threading

import click
import psutil
import torch

import specexec
from specexec.sampling.params import SamplingParams
from specexec.stats import Completion


@click.command()
@click.option("--items", default=1000, show_default=True)
@click.option("-n", "--max-tokens", default=24, show_default=True)
@click.option("--parallel", default=16, show_default=True)
@click.option("--drafter", default="auto", show_default=True)
@click.option("--allowed", default=24, show_default=True, help="MiB that the second half may add.")
def main(items: int, max_tokens: int, parallel: int, drafter: str, allowed: int) -> None:
    """Print a line for every tenth of the items; the exit code is 1 if the second half left something behind."""
    process = psutil.Process()
    held: list[tuple[int, int, int, int]] = []
    click.echo("| items | open files | threads | tensors | RSS, MiB |")
    click.echo("|------:|-----------:|--------:|--------:|---------:|")
    with specexec.load("demo", offload="disk", dtype="f32", budget=8, drafter=drafter) as llm:
        for part in range(10):
            # Every tenth is a batch of its own, so that the lines compare states of rest.
            prompts = [f"Question {part}-{number}: {'and ' * (number % 9)}why?" for number in range(items // 10)]
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=part, ignore_eos=True)
            answers = list(llm.generate_many(prompts, sampling, parallel=parallel))
            assert all(isinstance(answer, Completion) for answer in answers)
            gc.collect()
            tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
            held.append((process.num_fds(), threading.active_count(), tensors, process.memory_info().rss >> 20))
            click.echo(f"| {(part + 1) * len(prompts)} | " + " | ".join(map(str, held[-1])) + " |")
    (files, threads, tensors, rss), last = held[4], held[-1]
    grown = (last[0] > files, last[1] > threads, last[2] > tensors + 8, last[3] > rss + allowed)
    sys.exit(1 if any(grown) else 0)


if __name__ == "__main__":
    main()
