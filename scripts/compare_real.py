"""Is the text the same in every mode? A real small model in float32, thousands of tokens for each group of modes.

The truth is plain decoding, one text at a time; at T = 0 that is itself compared with transformers' own `generate`.
Every other mode writes the same prompts with the same seeds: its tokens are compared one by one up to the first
difference of a text. What is done is kept (--keep), so that an interrupted run goes on where it was.

    python scripts/compare_real.py --keep /tmp/compared.json
    python scripts/compare_real.py --prompts 4 --tokens 16 --only drafters
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import real_material
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specexec
from offload import Offload
from offload.names import demo_folder
from specexec.sampling import SamplingParams

PROMPTS = Path(__file__).with_name("prompts.jsonl")

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "T 0.7, top-p": SamplingParams(temperature=0.7, top_p=0.9),
    "T 1.2, top-k": SamplingParams(temperature=1.2, top_k=50),
    "T 1.0, min-p": SamplingParams(temperature=1.0, min_p=0.05),
    "T 0.7, repetition": SamplingParams(temperature=0.7, repetition_penalty=1.2),
    "T 1.2, presence": SamplingParams(temperature=1.2, top_p=0.8, presence_penalty=0.7, frequency_penalty=0.4),
}


@dataclass(frozen=True)
class Mode:
    """One way to write: how the engine is loaded, and how many texts share each sweep."""

    drafter: str = "none"
    budget: int | Literal["auto"] = 8
    offload: Offload = "none"
    parallel: int = 8

    def __str__(self) -> str:
        return f"{self.drafter}, budget {self.budget}, {self.offload}, {self.parallel} at once"


TRUTH = Mode(parallel=1)
GROUPS: dict[str, list[Mode]] = {
    "company": [Mode(parallel=3), Mode(parallel=16), Mode("ngram", parallel=1)],
    "drafters": [Mode(kind) for kind in ("ngram", "substitute", "skip", "demo", "ngram+skip")],
    "budgets": [Mode("ngram", budget) for budget in (0, 64, "auto")],
    "placements": [Mode("ngram", 8, "ram"), Mode("ngram", 8, "disk"), Mode(offload="disk")],
}


@dataclass
class Tally:
    """What was compared in one mode."""

    texts: int = 0
    tokens: int = 0
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, truth: list[int], written: list[int]) -> None:
        same = next((at for at, (a, b) in enumerate(zip(truth, written, strict=False)) if a != b), None)
        if same is None and len(truth) != len(written):
            same = min(len(truth), len(written))
        self.texts += 1
        self.tokens += len(truth) if same is None else same + 1
        if same is not None:
            self.differing.append(f"{name} at token {same}")


class Kept:
    """Texts and tallies, written to a file after every step."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        known: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
        self.truth: dict[str, list[int]] = known.get("truth", {})
        self.tallies = {name: Tally(**tally) for name, tally in known.get("tallies", {}).items()}

    def save(self) -> None:
        if self._file is not None:
            tallies = {name: asdict(tally) for name, tally in self.tallies.items()}
            self._file.write_text(json.dumps({"truth": self.truth, "tallies": tallies}))


def written_by(
    mode: Mode, folder: Path, prompts: list[list[int]], tokens: int, names: list[str]
) -> Iterator[tuple[str, list[int]]]:
    """Every text of these samplings in one mode, by sampling and prompt."""
    drafter = str(demo_folder("target")) if mode.drafter == "demo" else mode.drafter
    with specexec.load(
        str(folder), drafter=drafter, budget=mode.budget, offload=mode.offload, dtype="f32", ctx=2048
    ) as engine:
        for name in names:
            sampling = SAMPLINGS[name]
            each = [
                SamplingParams(**{**asdict(sampling), "seed": seed, "max_tokens": tokens})
                for seed in range(len(prompts))
            ]
            for result in engine.generate_many(prompts, each, mode.parallel):
                if not isinstance(result, specexec.Completion):
                    raise result.error
                yield f"{name} / {result.index}", list(result.tokens)


def by_transformers(folder: Path, prompts: list[list[int]], tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Greedy texts by transformers' own generate."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        yield f"greedy / {index}", made[0, len(prompt) :].tolist()


def compared(kept: Kept, name: str, write: Callable[[], Iterator[tuple[str, list[int]]]]) -> Tally:
    if name not in kept.tallies:
        tally, began_s = Tally(), time.monotonic()
        for text, tokens in write():
            tally.add(text, kept.truth[text], tokens)
            tally.seconds = time.monotonic() - began_s
            click.echo(f"\r{name}: {tally.texts} texts, {tally.tokens} tokens", nl=False, err=True)
        click.echo(err=True)
        kept.tallies[name] = tally
        kept.save()
    return kept.tallies[name]


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--prompts", default=44, show_default=True, help="How many prompts.")
@click.option("--first", default=0, show_default=True, help="The prompt to begin with.")
@click.option("--tokens", default=48, show_default=True, help="How many tokens a text may have.")
@click.option("--only", type=click.Choice([*GROUPS, "transformers"]), multiple=True, help="These groups of modes.")
@click.option("--sampling", type=click.Choice([*SAMPLINGS]), multiple=True, help="These ways of sampling.")
@click.option("--minutes", type=float, help="Begin no further mode after so long.")
@click.option("--keep", type=click.Path(path_type=Path, dir_okay=False), help="Go on from this file, and keep it.")
def main(
    prompts: int,
    first: int,
    tokens: int,
    only: tuple[str, ...],
    sampling: tuple[str, ...],
    minutes: float | None,
    keep: Path | None,
) -> None:
    logging.getLogger("specexec").setLevel(logging.ERROR)
    folder, names = real_material.model(), list(sampling or SAMPLINGS)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()][first : first + prompts]
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, return_dict=False)
        for one in asked
    ]
    kept, began_s = Kept(keep), time.monotonic()
    missing = [name for name in names if f"{name} / {len(ids) - 1}" not in kept.truth]
    for text, written in written_by(TRUTH, folder, ids, tokens, missing) if missing else ():
        kept.truth[text] = written
        click.echo(f"\rplain decoding: {len(kept.truth)} texts", nl=False, err=True)
        kept.save()
    click.echo(err=True)
    wanted = only or ("transformers", *GROUPS)
    if "transformers" in wanted and "greedy" in names:
        compared(kept, "transformers' generate", lambda: by_transformers(folder, ids, tokens))
    for group in (group for group in GROUPS if group in wanted):
        for mode in GROUPS[group]:
            if minutes is None or time.monotonic() - began_s < 60 * minutes:
                compared(kept, f"{group}: {mode}", lambda mode=mode: written_by(mode, folder, ids, tokens, names))  # type: ignore[misc]
    report(kept)


def report(kept: Kept) -> None:
    sums: Counter[str] = Counter()
    different: Counter[str] = Counter()
    click.echo("| mode | texts | tokens compared | texts that differ | seconds |\n|---|---|---|---|---|")
    for name, tally in kept.tallies.items():
        click.echo(f"| {name} | {tally.texts} | {tally.tokens} | {len(tally.differing)} | {tally.seconds:.0f} |")
        sums[name.partition(":")[0]] += tally.tokens
        different[name.partition(":")[0]] += len(tally.differing)
    for group, total in sums.items():
        click.echo(f"{group}: {total} tokens, {different[group]} texts differ")
    for name, tally in kept.tallies.items():
        for place in tally.differing:
            click.echo(f"{name}: {place}")


if __name__ == "__main__":
    main()
