"""Tokens per sweep of a drafter with another vocabulary: SmolLM2 with the demo's drafter, and the demo with SmolLM2.

    python scripts/measure_translated.py --limit 6 --tokens 32

Texts are compared with plain decoding's. --drafter ngram, for comparison: what the text alone gives.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from real_material import model

import specexec
from offload.hub.names import demo_folder
from specexec import SamplingParams

PROMPTS = Path(__file__).parent / "prompts.jsonl"


def written(
    target: str, drafter: str, temperature: float, asked: list[str], tokens: int, budget: int
) -> tuple[list[tuple[int, ...]], int]:
    """All texts, and the sweeps they took."""
    with specexec.load(target, drafter=drafter, offload="none", dtype="f32", budget=budget) as llm:
        answers = [
            llm.generate(
                [{"role": "user", "content": one}],
                SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens),
            )
            for seed, one in enumerate(asked)
        ]
    return [one.tokens for one in answers], sum(one.sweeps for one in answers)


@click.command()
@click.option("--limit", default=6, help="Prompts.")
@click.option("--tokens", default=32, help="Of each answer.")
@click.option("--budget", default=32)
def main(limit: int, tokens: int, budget: int) -> None:
    """Measure both directions at T = 0 and 0.8."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["prompt"] for line in lines[:: max(len(lines) // limit, 1)]][:limit]
    small = str(demo_folder("drafter"))
    click.echo("| target | drafter | T | tokens | sweeps | tokens per sweep | texts equal to plain |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, target, drafter in (("SmolLM2", str(model()), small), ("demo", "demo", str(model()))):
        for temperature in (0.0, 0.8):
            plain, _ = written(target, "none", temperature, asked, tokens, 0)
            for label, who in (("translated", drafter), ("translated+ngram", f"{drafter}+ngram"), ("ngram", "ngram")):
                texts, sweeps = written(target, who, temperature, asked, tokens, budget)
                count, equal = sum(map(len, texts)), sum(a == b for a, b in zip(texts, plain, strict=True))
                click.echo(
                    f"| {name} | {label} | {temperature} | {count} | {sweeps} | {count / sweeps:.2f} "
                    f"| {equal} of {len(plain)} |"
                )


if __name__ == "__main__":
    main()
