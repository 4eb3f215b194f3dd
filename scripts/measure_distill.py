"""Tokens per sweep of a head that was distilled here, beside `ngram` and `substitute`, on prompts it has never seen.

    python scripts/ordinary_prompts.py OUT
    specexec distill record -m MODEL -d none --prompts OUT/train.jsonl -o OUT/recorded -n 128 --top 32
    specexec distill head OUT/recorded -o OUT/head --draft-vocab 8k
    python scripts/measure_distill.py MODEL OUT/head OUT/held_out.txt --state OUT/measured.jsonl --minutes 3

MODEL is SmolLM2-135M-Instruct (scripts/real_material.py), or another. Each of these commands goes on where it was
stopped. All drafters answer a prompt before the next prompt comes; the table holds the prompts that all have answered.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import click

import specexec
from specexec import SamplingParams
from specexec.engine.engine import Engine

TEMPERATURES = (0.0, 0.8)
Key = tuple[str, float, int]


def answered(engine: Engine, prompt: str, temperature: float, tokens: int) -> tuple[int, int]:
    """Tokens of one answer, and the sweeps that wrote them."""
    how = SamplingParams(temperature=temperature, seed=1, max_tokens=tokens)
    done = engine.generate([{"role": "user", "content": prompt}], how)
    return len(done.tokens), done.sweeps


def table(found: dict[Key, tuple[int, int]], drafters: list[str]) -> str:
    """Tokens per sweep of each drafter and temperature, over the prompts that all have answered."""
    per_prompt = defaultdict[int, int](int)
    for _, _, number in found:
        per_prompt[number] += 1
    whole = [number for number, many in per_prompt.items() if many == len(drafters) * len(TEMPERATURES)]
    lines = [f"{len(whole)} prompts"]
    for drafter in drafters:
        rates = []
        for temperature in TEMPERATURES:
            both = [found[drafter, temperature, number] for number in whole]
            rates.append(sum(tokens for tokens, _ in both) / max(sum(sweeps for _, sweeps in both), 1))
        lines.append(f"{Path(drafter).name:24}" + "".join(f"{rate:8.2f}" for rate in rates))
    return "\n".join(lines)


@click.command()
@click.argument("model")
@click.argument("head")
@click.argument("prompts", type=click.Path(path_type=Path, exists=True))
@click.option("--beside", default="ngram,substitute", help="Drafters to compare with, joined by commas.")
@click.option("--budget", default=16, help="Guesses of a sweep.")
@click.option("--tokens", default=48, help="Of an answer, at most.")
@click.option("--minutes", default=3.0, help="End before the next prompt after so long.")
@click.option("--state", type=click.Path(path_type=Path), required=True, help="What has been measured.")
def main(
    model: str, head: str, prompts: Path, beside: str, budget: int, tokens: int, minutes: float, state: Path
) -> None:
    """Measure, and print tokens per sweep at temperature 0 and 0.8."""
    ends_s = time.monotonic() + 60 * minutes
    lines = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    found: dict[Key, tuple[int, int]] = {
        (d, t, n): (tokens, sweeps) for d, t, n, tokens, sweeps in map(json.loads, lines)
    }
    drafters = [head, *beside.split(",")]
    engines = {one: specexec.load(model, drafter=one, budget=budget, ctx=1024) for one in drafters}
    for number, prompt in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        for drafter, temperature in ((d, t) for d in drafters for t in TEMPERATURES):
            if (drafter, temperature, number) in found or time.monotonic() > ends_s:
                continue
            one = found[drafter, temperature, number] = answered(engines[drafter], prompt, temperature, tokens)
            with state.open("a", encoding="utf-8") as file:
                file.write(json.dumps([drafter, temperature, number, *one]) + "\n")
    click.echo(table(found, drafters))
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
