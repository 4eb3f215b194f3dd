"""Whether a real model's text is the same in every mode, token by token: SmolLM2-135M-Instruct in float32.

    python scripts/compare_real.py --minutes 60
    python scripts/compare_real.py --minutes 60 --state run.jsonl     # goes on where that run ended

What each prompt and kind of sampling gives alone, without drafter, resident, is compared with what every drafter,
placement, budget and number of texts gives; greedy text also with transformers' own `generate`. A round takes three
prompts through all modes, so a run that ends early has seen all of them. The table says, for each value of each mode,
how many tokens were compared and how many texts differed, and where they first did.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import click
import torch
from real_material import model
from transformers import AutoModelForCausalLM

import specexec
from offload.hub.names import demo_folder
from specexec import Completion, SamplingParams
from specexec.compose.earlier_runs import EarlierRuns
from specexec.drafters import skip
from specexec.engine.engine import Engine

PROMPTS = Path(__file__).parent / "prompts.jsonl"
SAMPLINGS: dict[str, dict[str, float | int]] = {
    "greedy": {"temperature": 0.0},
    "T 0.7": {"temperature": 0.7},
    "T 1.2": {"temperature": 1.2},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 30},
    "min-p": {"temperature": 1.2, "min_p": 0.05},
    "penalties": {
        "temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3
    },
}  # fmt: skip
DRAFTERS = {
    "none": "none",
    "ngram": "ngram",
    "substitute": "substitute",
    "skip": "skip",
    "translated": str(demo_folder("drafter")),
}
PLACEMENTS: tuple[Literal["none", "ram", "disk"], ...] = ("none", "ram", "disk")
BUDGETS: tuple[int | Literal["auto"], ...] = (0, 8, "auto")
TEXTS = ("alone", "three together")
TOGETHER = 3
Text = tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One way to write the texts of one round."""

    number: int  # of the round
    drafter: str
    placement: str
    budget: int | str
    texts: str

    @property
    def values(self) -> dict[str, str]:
        return {
            "drafter": self.drafter,
            "placement": self.placement,
            "budget": str(self.budget),
            "texts": self.texts,
        }


@dataclass
class Count:
    """What was compared under one value of one mode."""

    tokens: int = 0
    texts: int = 0
    different: int = 0


@dataclass
class State:
    """What was written and compared so far, kept line by line in a file if there is one."""

    file: Path | None
    plain: dict[tuple[int, str, int], Text] = field(default_factory=dict)  # by round, sampling and place in the round
    done: set[str] = field(default_factory=set)
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    @staticmethod
    def of(file: Path | None) -> State:
        state = State(file)
        for line in file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []:
            state.take(json.loads(line))
        return state

    def take(self, record: dict[str, Any]) -> None:
        """One line of the file: plain texts, or the outcome of a cell."""
        if "plain" in record:
            for number, sampling, place, tokens in record["plain"]:
                self.plain[number, sampling, place] = tuple(tokens)
            return
        self.done.add(str(record["cell"]))
        self.differences += record["differences"]
        for mode, value, tokens, texts, different in record["counts"]:
            count = self.counts.setdefault((mode, value), Count())
            count.tokens, count.texts = count.tokens + tokens, count.texts + texts
            count.different += different

    def add(self, record: dict[str, Any]) -> None:
        """The same for something new."""
        self.take(record)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")

    def compare(self, name: str, values: dict[str, str], texts: dict[tuple[int, str, int], Text]) -> None:
        """Count a cell's texts under all its modes."""
        counts: dict[tuple[str, str], Count] = {}
        differences = []
        for key, text in texts.items():
            plain = self.plain[key]
            first = next((at for at, (a, b) in enumerate(zip(plain, text, strict=False)) if a != b), None)
            if first is None and len(plain) != len(text):
                first = min(len(plain), len(text))
            if first is not None:
                differences.append(f"{name}, {key[1]}, prompt {key[0] * TOGETHER + key[2]}: token {first}")
            for mode, value in {**values, "sampling": key[1]}.items():
                count = counts.setdefault((mode, value), Count())
                count.tokens, count.texts = count.tokens + len(plain), count.texts + 1
                count.different += first is not None
        rows = [[*key, one.tokens, one.texts, one.different] for key, one in counts.items()]
        self.add({"cell": name, "differences": differences, "counts": rows})


def prompts(llm: Engine, number: int) -> list[list[int]]:
    """The prompts of one round, as token ids behind the chat template."""
    asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    chosen = [asked[(number * TOGETHER + place) % len(asked)] for place in range(TOGETHER)]
    return [llm.encode([{"role": "user", "content": one}]) for one in chosen]


def write(llm: Engine, number: int, tokens: int, texts: str) -> dict[tuple[int, str, int], Text]:
    """All texts of a round, each with a seed of its own."""
    found: dict[tuple[int, str, int], Text] = {}
    for name, values in SAMPLINGS.items():
        each = [
            SamplingParams(**values, max_tokens=tokens, seed=100 * number + place)  # type: ignore[arg-type]
            for place in range(TOGETHER)
        ]
        for one in llm.generate_many(prompts(llm, number), each, parallel=1 if texts == "alone" else TOGETHER):
            assert isinstance(one, Completion), one
            found[number, name, one.index] = one.tokens
    return found


def greedily(llm: Engine, number: int, tokens: int) -> dict[tuple[int, str, int], Text]:
    """What transformers' own generate writes at T = 0, one prompt at a time."""
    truth = AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32)
    generate: Callable[..., torch.Tensor] = getattr(truth, "generate")  # noqa: B009 - its own annotations refuse it
    found: dict[tuple[int, str, int], Text] = {}
    for place, ids in enumerate(prompts(llm, number)):
        with torch.no_grad():
            whole = generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        found[number, "greedy", place] = tuple(whole[0, len(ids) :].tolist())
    return found


def cells(
    number: int, each: int, drafters: Items[str]
) -> Iterator[tuple[str, Literal["none", "ram", "disk"], list[Cell]]]:
    """`each` of the cells that one load of the model can write, and the loads, in random order."""
    chance = random.Random(number)
    loads = [*product(drafters, PLACEMENTS)]
    chance.shuffle(loads)
    for drafter, placement in loads:
        chosen = chance.sample([*product(BUDGETS, TEXTS)], each)
        yield drafter, placement, [Cell(number, drafter, placement, *one) for one in chosen]


def compare_round(state: State, number: int, tokens: int, each: int, drafters: Items[str], ends_s: float) -> bool:
    """Everything of one round that is not done yet; False if time is up."""
    folder = str(model())
    if (number, "greedy", 0) not in state.plain:
        with specexec.load(folder, drafter="none", offload="none", dtype="f32", budget=0) as llm:
            texts = write(llm, number, tokens, "alone")
            state.add({"plain": [[*key, text] for key, text in texts.items()]})
            state.compare(f"{number} generate", {"truth": "transformers generate"}, greedily(llm, number, tokens))
    earlier = EarlierRuns()
    for drafter, placement, wanted in cells(number, each, drafters):
        left = [cell for cell in wanted if str(cell) not in state.done]
        if not left:
            continue
        with specexec.load(
            folder, drafter=DRAFTERS[drafter], offload=placement, dtype="f32", budget="auto", earlier=earlier
        ) as llm:
            for cell in left:
                if time.monotonic() > ends_s:
                    return False
                llm.budget = cell.budget if cell.budget == "auto" else int(cell.budget)  # type: ignore[assignment]
                state.compare(str(cell), cell.values, write(llm, number, tokens, cell.texts))
                compared = sum(count.tokens for (mode, _), count in state.counts.items() if mode == "sampling")
                say = f"round {number}: {drafter}, {placement}, budget {cell.budget}, {cell.texts}"
                click.echo(
                    f"\r\x1b[K{say}; {compared:,} tokens compared, {len(state.differences)} texts differ",
                    err=True,
                    nl=False,
                )
    return True


@click.command()
@click.option("--minutes", default=60.0, help="Stop after so long, at the end of a mode.")
@click.option("--tokens", default=24, help="Of every text.")
@click.option("--rounds", default=1000, help="Of three prompts each.")
@click.option(
    "--each", default=6, type=click.IntRange(1, 6), help="Budgets and numbers of texts tried per drafter and placement."
)
@click.option("--drafter", "drafters", multiple=True, type=click.Choice([*DRAFTERS]), default=[*DRAFTERS])
@click.option("--state", "file", type=click.Path(path_type=Path), help="Keep what was compared here and go on from it.")
def main(minutes: float, tokens: int, rounds: int, each: int, drafters: tuple[str, ...], file: Path | None) -> None:
    """Compare a real model's texts across all modes."""
    skip.TRIES = 4  # sets that skip looks at: texts must not depend on it, and a search takes minutes
    ends_s = time.monotonic() + 60 * minutes
    state = State.of(file)
    for number in range(rounds):
        if time.monotonic() > ends_s or not compare_round(state, number, tokens, each, drafters, ends_s):
            break
    click.echo(err=True)
    click.echo("| mode | value | texts | tokens compared | texts that differ |\n|---|---|---|---|---|")
    for (mode, value), count in sorted(state.counts.items()):
        click.echo(f"| {mode} | {value} | {count.texts:,} | {count.tokens:,} | {count.different} |")
    for difference in state.differences:
        click.echo(difference)
    sys.exit(1 if state.differences else 0)


if __name__ == "__main__":
    main()
