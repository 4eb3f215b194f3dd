"""What a trimmed drafter head saves, and what it costs in tokens per sweep (--draft-vocab).

Tokens per sweep: the first --limit prompts of prompts.jsonl, in turn with each size of the head, after it has seen the
answers to the others and to nothing else (the target's log); ratios to the whole head with a 95 % bootstrap interval
over prompts, texts compared with plain decoding. Time: one pass's head, noise and candidates at the size of a large
model, in CPU milliseconds, whole and trimmed in turns.

    python scripts/measure_vocabulary.py --sizes 512,1024,2048
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from bootstrap import ratio
from measure_trees import prompts

import specexec
from specexec import SamplingParams
from specexec.drafters.trimmed_head import Columns
from specexec.sampling.noise import Noise
from specexec.sampling.scores import with_noise
from specexec.sizes import CANDIDATES


@click.command()
@click.option("--sizes", default="256,512,1024,2048", show_default=True, help="Tokens of the head. Comma list.")
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--budget", default=64, show_default=True)
@click.option("--limit", default=22, show_default=True, help="Prompts; the others are for the log.")
@click.option("--tokens", default=40, show_default=True, help="New tokens for each prompt.")
@click.option("--head", default="128256x2048", show_default=True, help="Vocabulary x hidden size of the timed head.")
@click.option("--kept", default=32768, show_default=True, help="Tokens of the timed trimmed head.")
def main(sizes: str, temperature: str, budget: int, limit: int, tokens: int, head: str, kept: int) -> None:
    """Measure --draft-vocab."""
    click.echo(
        "| T | head | tokens per sweep | ratio to the whole head | texts equal to plain |\n|---|---|---|---|---|"
    )
    for warmth in (float(part) for part in temperature.split(",")):
        plain, base = speeds(warmth, None, 0, limit, tokens)[0], None
        for size in (None, *(int(part) for part in sizes.split(","))):
            texts, rows = speeds(warmth, size, budget, limit, tokens)
            base = rows if base is None else base
            equal = sum(ours == theirs for ours, theirs in zip(texts, plain, strict=True))
            speed = f"{rows[:, 0].sum() / rows[:, 1].sum():.2f}"
            cells = (f"{warmth:g}", str(size or "whole"), speed, ratio(rows, base), f"{equal} of {len(texts)}")
            click.echo(f"| {' | '.join(cells)} |")
    vocabulary, hidden = (int(part) for part in head.split("x"))
    click.echo(f"\n{passes(vocabulary, hidden, kept)}")


def speeds(
    warmth: float, size: int | None, budget: int, limit: int, tokens: int
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Texts, and tokens and sweeps of each prompt, [prompts, 2]."""
    with specexec.load(drafter="sibling", draft_vocab=size, budget=budget, dtype="f32", offload="none") as llm:
        samplings = [SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(limit)]
        for prompt in prompts()[limit:] if budget else []:
            llm.generate(prompt, samplings[0])
        answers = [llm.generate(*asked) for asked in zip(prompts()[:limit], samplings, strict=False)]
    return [one.tokens for one in answers], np.array([[len(one.tokens), one.sweeps] for one in answers])


def passes(vocabulary: int, hidden: int, kept: int, rows: int = 64, positions: int = 16) -> str:
    """CPU time of everything that depends on the size of the head, for `rows` nodes at `positions` positions."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    ids_S = torch.randperm(vocabulary, generator=generator)[:kept]
    weight_SH, hidden_NH = weight_VH[ids_S].clone(), torch.randn(rows, hidden, generator=generator)
    noise, at = Noise(0, vocabulary), [i % positions for i in range(rows)]
    noise.rows(range(positions))  # the target needs it anyway

    def whole() -> None:
        with_noise(hidden_NH @ weight_VH.T, 0.8, noise, at).topk(CANDIDATES)

    def trimmed() -> None:
        ids_S[with_noise(hidden_NH @ weight_SH.T, 0.8, Columns(noise, ids_S), at).topk(CANDIDATES).indices]

    took: dict[str, list[float]] = {"whole": [], "trimmed": []}
    for _ in range(7):
        for name, work in (("whole", whole), ("trimmed", trimmed)):
            took[name].append(cpu_ms(work))
    ratios = sorted(b / a for a, b in zip(took["whole"], took["trimmed"], strict=True))
    whole_ms, trimmed_ms = (statistics.median(took[name]) for name in ("whole", "trimmed"))
    return (
        f"head {vocabulary} x {hidden} float32, {rows} nodes, T = 0.8: whole {whole_ms:.0f}, {kept} tokens "
        f"{trimmed_ms:.0f} CPU ms; {statistics.median(ratios):.2f} of it ({ratios[0]:.2f}–{ratios[-1]:.2f} in 7 turns)"
    )


def cpu_ms(work: Callable[[], None]) -> float:
    """Milliseconds of CPU time."""
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    main()
