"""What trees cost beside the models: growth, attention bookkeeping, walk and cache commit, in milliseconds per sweep.

A drafter of random numbers stands for the real one and its time is taken out, so only our own work is left. CPU time:
a busy machine does not count. Prints the median over repeats for each size; the aim is 50 ms (5 % of a one-second
sweep) at 4096 nodes.

    python scripts/measure_bookkeeping.py --nodes 64,512,4096
"""

from __future__ import annotations

import time
from statistics import median

import click
import numpy as np
import torch

from specexec.budget import FixedBudget
from specexec.cache import KVCache
from specexec.cost import CostModel
from specexec.drafters import Ask, Guesses
from specexec.lm import Rows, _span
from specexec.noise import Noise
from specexec.planner import BestFirst
from specexec.sampling import History, SamplingParams
from specexec.sequence import Sequence, start
from specexec.tree import Ints, TokenTree
from specexec.walk import Opinion, walk

VOCABULARY = 32_000
LAYERS, HEADS, SIZE = 16, 8, 64
PREFIX = 2000


class RandomDrafter:
    """Likely-looking children out of thin air; remembers how long that took."""

    name = "random"
    context = 2**31

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.own_s = 0.0

    def at_hand(self, asks: list[Ask]) -> list[Ask]:
        return []

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        began = time.process_time()
        made = []
        for ask in asks:
            scores = -np.sort(-self.generator.normal(0, 2.5, (len(ask.nodes), width)), axis=1)
            log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
            tokens = self.generator.integers(0, VOCABULARY, scores.shape)
            made.append(Guesses(tokens, log_probs))
        self.own_s += time.process_time() - began
        return made

    def observe(self, sequence: Sequence, tree: TokenTree, choices_M: list[int], kept: Ints | None) -> None: ...


def cache_of(tokens: list[int]) -> KVCache:
    """A committed prefix with rows in every layer."""
    cache = KVCache()
    cache.node_tokens, cache.parents = list(tokens), list(range(-1, len(tokens) - 1))
    for layer in range(LAYERS):
        rows = torch.zeros(HEADS, len(tokens), SIZE, dtype=torch.bfloat16)
        cache.write(layer, 0, rows, rows)
    cache.commit(range(len(tokens)))
    return cache


def one_sweep(nodes: int) -> dict[str, float]:
    """Milliseconds of each part."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1000)
    tokens = [5] * (PREFIX + 1)
    sequence = start(tokens, sampling, Noise(0, VOCABULARY), str, frozenset(), 10**6)
    sequence.processed = PREFIX
    drafter, times = RandomDrafter(), {}

    began = time.process_time()
    (tree,) = BestFirst().grow(drafter, [sequence], FixedBudget(nodes), CostModel())
    times["growth"] = time.process_time() - began - drafter.own_s
    assert len(tree) == nodes

    cache = cache_of(tokens[:-1])
    new_rows = torch.zeros(HEADS, nodes + 1, SIZE, dtype=torch.bfloat16)
    began = time.process_time()
    parents = [-1, *np.where(tree.parents_N < 0, 0, tree.parents_N + 1).tolist()]
    _span(Rows(cache, [5, *tree.tokens], parents), 0, torch.device("cpu"))
    times["who sees whom"] = time.process_time() - began
    for layer in range(LAYERS):
        cache.write(layer, 0, new_rows, new_rows)

    # A target that agrees with the deepest path.
    path = tree.path(int(tree.depth_N.argmax()))
    wanted = dict(zip([0, *(node + 1 for node in path)], [*(tree.tokens[node] for node in path), 7], strict=True))
    hidden = torch.tensor([[float(wanted.get(row, 0))] for row in range(nodes + 1)])

    def head(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows), 1).expand(-1, 1)

    opinion = Opinion(head, hidden, tree, PREFIX + 1, sampling, Noise(0, VOCABULARY))
    opinion.choices_M = [int(row[0]) for row in hidden.tolist()]  # the head's own time is the model's
    began = time.process_time()
    acceptance = walk(opinion, History.of(tokens, []))
    times["walk"] = time.process_time() - began
    assert list(acceptance.path) == path

    began = time.process_time()
    cache.commit([0, *(node + 1 for node in path)])
    sequence.growth.below(acceptance.tokens)
    times["commit"] = time.process_time() - began
    return {name: 1000 * seconds for name, seconds in times.items()}


@click.command()
@click.option("--nodes", default="64,512,4096", show_default=True, help="Comma list.")
@click.option("--repeat", default=7, show_default=True)
def main(nodes: str, repeat: int) -> None:
    """Measure our own work per sweep."""
    click.echo("| nodes | growth | who sees whom | walk | commit | all, CPU ms (min–max) |\n|---|---|---|---|---|---|")
    for count in (int(part) for part in nodes.split(",")):
        one_sweep(count)
        runs = [one_sweep(count) for _ in range(repeat)]
        parts = " | ".join(f"{median(run[name] for run in runs):.1f}" for name in runs[0])
        totals = sorted(sum(run.values()) for run in runs)
        click.echo(f"| {count} | {parts} | {median(totals):.1f} ({totals[0]:.1f}–{totals[-1]:.1f}) |")


if __name__ == "__main__":
    main()
