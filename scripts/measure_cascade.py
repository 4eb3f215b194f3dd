"""What reading along saves: passes of the drafter model, with and without chains of likely tokens below its nodes.

The prompts of measure_sources.py, ordinary and copy-heavy. Every prompt is answered twice in a row, without and with
the cascade, by drafters that go on learning from prompt to prompt. Prints drafter passes and rows for each sweep, their
ratio and that of the seconds in which trees grew, with a 95 % interval from a bootstrap over the same prompts, and in
how many of the sweeps both submitted the same tree. Texts must be equal.

    python scripts/measure_cascade.py --budget 64 --temperature 0,0.8
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
import numpy as np
from bootstrap import ratio
from measure_sources import copy_heavy, source_options
from measure_trees import prompts
from tqdm import tqdm

import specexec
from specexec import SamplingParams
from specexec.drafters.cascade import Cascade
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine.engine import Engine
from specexec.model.tree_lm import TreeLM
from specexec.text.messages import Prompt
from specexec.tree.tree import TokenTree

SOURCES = ("sibling", "sibling+ngram")
WAYS = {"without": 0, "with": 16}


@dataclass
class Count:
    """Passes and rows of a drafter model."""

    passes: int = 0
    rows: int = 0


@contextmanager
def counted(lm: TreeLM) -> Iterator[Count]:
    """Count while the model reads."""
    count, forward = Count(), lm.forward

    def read(parts: list[specexec.model.tree_lm.Rows], cancelled: object = None) -> object:
        count.passes += 1
        count.rows += sum(len(part.tokens) for part in parts)
        return forward(parts)

    lm.forward = read  # type: ignore[method-assign,assignment]  # only to look on
    try:
        yield count
    finally:
        del lm.forward


@dataclass
class Run:
    """All answers of one drafter, prompt by prompt."""

    drafter: Drafter
    memory: Memory
    rows: list[tuple[int, int, int, int, float]] = field(default_factory=list)  # tokens, sweeps, passes, rows, seconds
    tokens: list[list[int]] = field(default_factory=list)
    trees: list[list[TokenTree]] = field(default_factory=list)

    def answer(self, llm: Engine, prompt: Prompt, sampling: SamplingParams) -> None:
        """Write the answer to one more prompt, and forget it."""
        llm._decoder.drafter = self.drafter
        with counted(llm._drafts["drafter"]) as count:
            bursts = list(llm.stream(prompt, sampling))
        tokens = [token for burst in bursts for token in burst.tokens]
        drafted_s = sum(burst.cost.draft_s for burst in bursts)
        self.rows.append((len(tokens), len(bursts), count.passes, count.rows, drafted_s))
        self.tokens.append(tokens)
        self.trees.append([burst.tree for burst in bursts])
        self.memory.forget_past()


def run(llm: Engine, source: str, longest: int) -> Run:
    """A drafter that has learned nothing yet."""
    memory = Memory()
    model = SiblingDrafter(llm._drafts["drafter"], len(llm.tokenizer), cascade=Cascade(memory, longest))
    return Run(Union([model, NgramDrafter(memory)]) if "ngram" in source else model, memory)


def nodes(tree: TokenTree) -> set[tuple[int, ...]]:
    """A tree as the texts that it guesses."""
    return {tree.spelled(node) for node in range(len(tree))}


@click.command()
@source_options
@click.option("--tokens", default=48, show_default=True, help="New tokens for each prompt.")
@click.option("--count", default=44, show_default=True, help="Prompts.")
def main(model: str, drafter: str, budget: int, temperature: str, tokens: int, count: int, dtype: str) -> None:
    """Measure what reading along saves."""
    with specexec.load(model, drafter=drafter, offload="none", dtype=dtype, budget=budget) as llm:
        every: list[Prompt] = [*prompts()]
        ordinary = every[:: len(every) // count][:count]
        copying: list[Prompt] = [copy_heavy(llm, prompt, tokens) for prompt in ordinary]
        click.echo(f"{len(ordinary)} prompts, {tokens} tokens each, budget {budget}, {model}, {dtype}\n")
        click.echo("| prompts | T | source | tokens per sweep | passes per sweep | rows per pass | ratio of passes | "
                   "ratio of drafting seconds | same trees | same texts |")  # fmt: skip
        click.echo("|---|---|---|---|---|---|---|---|---|---|")
        for warmth in (float(part) for part in temperature.split(",")):
            for name, asked in (("ordinary", ordinary), ("copy-heavy", copying)):
                for source in SOURCES:
                    plain, along = (run(llm, source, longest) for longest in WAYS.values())
                    for number, prompt in enumerate(tqdm(asked, desc=source, leave=False, disable=None)):
                        sampling = SamplingParams(temperature=warmth, seed=100 + number, max_tokens=tokens)
                        plain.answer(llm, prompt, sampling)
                        along.answer(llm, prompt, sampling)
                    click.echo(row(name, warmth, source, plain, along))


def row(name: str, warmth: float, source: str, plain: Run, along: Run) -> str:
    """One line of the table; pairs are without → with."""
    pair = [np.array(one.rows) for one in (plain, along)]
    total = [rows.sum(0) for rows in pair]
    # Sweep by sweep as long as both wrote the same with the same sweeps.
    trees = [
        nodes(left) == nodes(right)
        for ours, theirs in zip(plain.trees, along.trees, strict=True)
        for left, right in zip(ours, theirs, strict=False)
    ]
    texts = sum(ours == theirs for ours, theirs in zip(plain.tokens, along.tokens, strict=True))
    cells = (
        name, f"{warmth:g}", source,
        " → ".join(f"{one[0] / one[1]:.2f}" for one in total),
        " → ".join(f"{one[2] / one[1]:.1f}" for one in total),
        " → ".join(f"{one[3] / one[2]:.1f}" for one in total),
        ratio(pair[1][:, [2, 1]], pair[0][:, [2, 1]]),
        ratio(pair[1][:, [4, 1]], pair[0][:, [4, 1]]),
        f"{sum(trees)} of {len(trees)}", f"{texts} of {len(plain.tokens)}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
