"""What asking the suffix store costs: CPU milliseconds for a tree, by tokens remembered.

The store holds random text of Zipfian words with phrases that come again; a tree of --nodes nodes is grown below a
context from it, by the ngram drafter alone and the planner that it gets. Prints the drafter's own time for each tree.

    python scripts/measure_lookup.py --tokens 100000,1000000 --nodes 64,512
"""

from __future__ import annotations

import time
from statistics import median

import click
import numpy as np

from specexec.drafters.cost import CostModel
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.protocol import Ask, Guesses
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.retrieval.suffix_index import Settled
from specexec.planning.baselines import planner_of
from specexec.planning.budget import FixedBudget
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import start

VOCABULARY = 32_000


class Timed(NgramDrafter):
    """Counts its own seconds and the nodes it was asked about."""

    spent_s = 0.0
    asked = 0

    def guess(self, asks: list[Ask], width: int) -> list[Guesses]:
        began = time.process_time()
        guesses = super().guess(asks, width)
        self.spent_s += time.process_time() - began
        self.asked += sum(len(ask.nodes) for ask in asks)
        return guesses


def text(tokens: int, generator: np.random.Generator) -> list[int]:
    """Words by Zipf's law, a third of it in phrases of 12 that come again."""
    words = np.minimum(generator.zipf(1.2, tokens), VOCABULARY - 1)
    phrases = np.minimum(generator.zipf(1.2, (max(tokens // 400, 1), 12)), VOCABULARY - 1)
    for at in range(0, tokens - 12, 36):
        words[at : at + 12] = phrases[generator.integers(len(phrases))]
    return [int(word) for word in words]


def one_tree(memory: Memory, prompt: list[int], nodes: int, temperature: float) -> tuple[float, int, int]:
    """CPU milliseconds of the drafter, nodes it was asked about, nodes of the tree."""
    sampling = SamplingParams(temperature=temperature, max_tokens=1000, seed=0)
    sequence = start(prompt, sampling, Noise(0, VOCABULARY), TextStream(str), frozenset(), 10**6)
    drafter = Timed(memory)
    drafter.guess([Ask(sequence, sequence.growth.tree, [-1])], 8)  # reading the prompt is not part of a sweep
    drafter.spent_s, drafter.asked = 0.0, 0
    (tree,) = planner_of("best", ["ngram"]).grow(drafter, [sequence], FixedBudget(nodes), CostModel())
    return 1000 * drafter.spent_s, drafter.asked, len(tree)


@click.command()
@click.option("--tokens", default="100000,1000000", show_default=True, help="Comma list.")
@click.option("--nodes", default="64,512", show_default=True, help="Comma list.")
@click.option("--repeat", default=9, show_default=True)
def main(tokens: str, nodes: str, repeat: int) -> None:
    """Measure the lookup."""
    click.echo("| tokens | T | nodes | asked | CPU ms a tree (min–max) | µs a node asked |\n|---|---|---|---|---|---|")
    for count in (int(part) for part in tokens.split(",")):
        generator = np.random.default_rng(0)
        corpus = text(count, generator)
        memory = Memory(corpus=Settled.of([corpus]))
        starts = generator.integers(0, count - 200, repeat).tolist()
        for temperature in (0.0, 0.8):
            for size in (int(part) for part in nodes.split(",")):
                runs = [one_tree(memory, corpus[at : at + 100], size, temperature) for at in starts]
                times = sorted(run[0] for run in runs)
                asked, grown = (median(run[i] for run in runs) for i in (1, 2))
                each = median(1000 * run[0] / max(run[1], 1) for run in runs)
                shown = f"{median(times):.1f} ({times[0]:.1f}–{times[-1]:.1f})"
                click.echo(f"| {count} | {temperature:g} | {grown:.0f} | {asked:.0f} | {shown} | {each:.0f} |")


if __name__ == "__main__":
    main()
