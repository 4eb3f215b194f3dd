"""What trees cost beside the models: growth, attention bookkeeping, walk and cache commit, in milliseconds per sweep.

The drafter model is one that computes nothing, with scores and top-k found beforehand, and looking them up is not
counted: only our own work is left, that of the drafter's file included. CPU time: a busy machine does not count. Prints
the median over repeats for each size; the aim is 50 ms (5 % of a one-second sweep) at 4096 nodes.

    python scripts/measure_bookkeeping.py --nodes 64,512,4096
    python scripts/measure_bookkeeping.py --members 2   # a union: two such models
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import click
import numpy as np
import torch
from torch import Tensor, return_types

from specexec.drafters.cost import CostModel
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.model.cache import KVCache
from specexec.model.sweep_rows import _span
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.planning.budget import FixedBudget
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import JudgedText, Processors
from specexec.sampling.verify import Opinion, walk
from specexec.sizes import CANDIDATES
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import start

VOCABULARY = 32_000
DRAFTED = 512  # tokens that the drafters know
ROWS = 16_384  # that they may be asked about
LAYERS, HEADS, SIZE = 16, 8, 64
PREFIX = 2000


class Clock:
    """Seconds of CPU time that simulating the model took."""

    model_s = 0.0

    @contextmanager
    def model(self) -> Iterator[None]:
        """Time that does not count."""
        began = time.process_time()
        yield
        self.model_s += time.process_time() - began


CLOCK = Clock()


class NoModel:
    """Replaces a drafter's TreeLM: the hidden state of a row is its number."""

    vocabulary, context = DRAFTED, 2**31

    def forward(self, parts: list[Rows]) -> list[Tensor]:
        heard = []
        with CLOCK.model():
            for part in parts:
                before = len(part.cache.parents)
                part.cache.node_tokens += part.tokens
                part.cache.parents += part.parents
                heard.append(torch.arange(before, len(part.cache.parents), dtype=torch.float64)[:, None])
        return heard

    def head(self, hidden_N1: Tensor) -> Tensor:
        return hidden_N1


class Table:
    """The best candidates of every row, found beforehand."""

    def __init__(self, seed: int) -> None:
        drawn = 2.5 * torch.randn(ROWS, DRAFTED, generator=torch.Generator().manual_seed(seed))
        self.best = drawn.topk(CANDIDATES)


@dataclass(frozen=True)
class Scores:
    """Scores of some rows of a table."""

    table: Table
    rows_N: Tensor
    shape: tuple[int, ...]

    def topk(self, count: int) -> return_types.topk:
        with CLOCK.model():
            values_NC, indices_NC = self.table.best
            return return_types.topk((values_NC[self.rows_N, :count], indices_NC[self.rows_N, :count]))


@dataclass(frozen=True)
class Ranked(Ranking):
    """Looks scores up."""

    table: Table = field(kw_only=True)

    def scores(self, rows_N1: Tensor, *_: object) -> Any:
        return Scores(self.table, rows_N1[:, 0].long(), (len(rows_N1), DRAFTED))


def cache_of(tokens: list[int]) -> KVCache:
    """A committed prefix with rows in every layer."""
    cache = KVCache()
    cache.node_tokens, cache.parents = list(tokens), list(range(-1, len(tokens) - 1))
    for layer in range(LAYERS):
        rows = torch.zeros(HEADS, len(tokens), SIZE, dtype=torch.bfloat16)
        cache.write(layer, 0, rows, rows)
    cache.commit(range(len(tokens)))
    return cache


def one_sweep(nodes: int, tables: list[Table]) -> dict[str, float]:
    """Milliseconds of each part."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1000)
    tokens = [5] * (PREFIX + 1)
    sequence = start(tokens, sampling, Noise(0, VOCABULARY), TextStream(str), frozenset(), 10**6)
    sequence.processed = PREFIX
    models, times = [NoModel() for _ in tables], {}
    made = [
        SiblingDrafter(cast(TreeLM, one), DRAFTED, Ranked(table=table))
        for one, table in zip(models, tables, strict=True)
    ]
    drafter = made[0] if len(made) == 1 else Union(made)
    for model, one in zip(models, made, strict=True):  # the text but for its last tokens has been read
        sequence.cache(model).tokens = tokens[:-2]
        one.cascade.memory.text_of(sequence)

    began, CLOCK.model_s = time.process_time(), 0.0
    (tree,) = BestFirst().grow(drafter, [sequence], FixedBudget(nodes), CostModel())
    times["growth"] = time.process_time() - began - CLOCK.model_s
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
    acceptance = walk(opinion, Processors(sampling, JudgedText(tuple(tokens), VOCABULARY)).history([]))
    times["walk"] = time.process_time() - began
    assert list(acceptance.path) == path

    began = time.process_time()
    cache.commit([0, *(node + 1 for node in path)])
    sequence.tokens += acceptance.tokens
    kept = sequence.growth.below(acceptance.tokens)
    times["commit"] = time.process_time() - began

    began = time.process_time()
    drafter.observe(sequence, tree, opinion.choices_M, kept)
    times["drafter learns"] = time.process_time() - began
    return {name: 1000 * seconds for name, seconds in times.items()}


@click.command()
@click.option("--nodes", default="64,512,4096", show_default=True, help="Comma list.")
@click.option("--repeat", default=7, show_default=True)
@click.option("--members", default=1, show_default=True, help="Drafter models; several make a union.")
def main(nodes: str, repeat: int, members: int) -> None:
    """Measure our own work per sweep."""
    torch.set_num_threads(1)  # others would only spin
    tables = [Table(seed) for seed in range(members)]
    click.echo("| nodes | growth | who sees whom | walk | commit | drafter learns | all, CPU ms (min–max) |")
    click.echo("|---|---|---|---|---|---|---|")
    for count in (int(part) for part in nodes.split(",")):
        one_sweep(count, tables)
        runs = [one_sweep(count, tables) for _ in range(repeat)]
        parts = " | ".join(f"{median(run[name] for run in runs):.1f}" for name in runs[0])
        totals = sorted(sum(run.values()) for run in runs)
        click.echo(f"| {count} | {parts} | {median(totals):.1f} ({totals[0]:.1f}–{totals[-1]:.1f}) |")


if __name__ == "__main__":
    main()
