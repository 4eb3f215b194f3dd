"""Tokens per sweep by source of guesses: sibling, ngram, sibling+ngram, on ordinary prompts and on copy-heavy ones.

Ordinary: every prompt of prompts.jsonl. Copy-heavy: the same, asked a second time below the target's own first answer,
as in editing, quoting and answering from a document. Every source starts with nothing learned, and forgets what it
wrote between prompts unless --session; texts must equal plain decoding with the same seed. Prints tokens / sweeps of
all prompts together and the ratio to the sibling alone, with a 95 % interval from a bootstrap over the same prompts.

    python scripts/measure_sources.py --budget 64 --temperature 0,0.8
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import click
import numpy as np
from bootstrap import ratio
from measure_trees import prompts
from tqdm import tqdm

import specexec
from specexec import SamplingParams
from specexec.conversation import Prompt
from specexec.drafters import Drafter
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.union import Union
from specexec.engine import Engine
from specexec.memory import Memory
from specexec.stats import Completion
from specexec.suffix import Recent

SOURCES = ("sibling", "ngram", "sibling+ngram")


def copy_heavy(llm: Engine, prompt: Prompt, tokens: int) -> list[int]:
    """The prompt, the target's greedy answer, and the prompt once more."""
    asked = llm.encode(prompt)
    answer = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=tokens)).tokens
    return [*asked, *answer, *asked]


def drafter_of(source: str, llm: Engine, memory: Memory) -> Drafter:
    """A drafter that has learned nothing yet, over the engine's loaded models."""
    assert llm._draft is not None
    members: dict[str, Drafter] = {
        "sibling": SiblingDrafter(llm._draft, len(llm.tokenizer)),
        "ngram": NgramDrafter(memory),
    }
    wanted = [members[name] for name in source.split("+")]
    return wanted[0] if len(wanted) == 1 else Union(wanted)


def measure(
    llm: Engine, source: str, asked: Items[Prompt], samplings: Items[SamplingParams], session: bool
) -> list[Completion]:
    """What the engine wrote for every prompt with one source."""
    memory = Memory()
    llm._decoder.drafter = drafter_of(source, llm, memory)
    answers: list[Completion] = []
    for prompt, sampling in tqdm(list(zip(asked, samplings, strict=True)), desc=source, leave=False, disable=None):
        answers.append(llm.generate(prompt, sampling))
        if not session:
            memory.recent = Recent()
    return answers


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--drafter", default="sibling", show_default=True, help="The model that drafts.")
@click.option("--budget", default=64, show_default=True)
@click.option("--temperature", default="0,0.8", show_default=True, help="Comma list.")
@click.option("--tokens", default=64, show_default=True, help="New tokens for each prompt.")
@click.option("--dtype", default="f32", show_default=True)
@click.option("--session", is_flag=True, help="Remember from prompt to prompt.")
def main(model: str, drafter: str, budget: int, temperature: str, tokens: int, dtype: str, session: bool) -> None:
    """Measure what each source adds."""
    with specexec.load(model, drafter=drafter, offload="none", dtype=dtype, budget=budget) as llm:
        ordinary: list[Prompt] = [*prompts()]
        copying: list[Prompt] = [copy_heavy(llm, prompt, tokens) for prompt in ordinary]
        click.echo(f"{len(ordinary)} prompts, {tokens} tokens each, budget {budget}, {model}, {dtype}\n")
        click.echo("| prompts | T | source | tokens per sweep | ratio to sibling | texts equal to plain |")
        click.echo("|---|---|---|---|---|---|")
        for warmth in (float(part) for part in temperature.split(",")):
            samplings = [
                SamplingParams(temperature=warmth, seed=100 + i, max_tokens=tokens) for i in range(len(ordinary))
            ]
            for name, asked in (("ordinary", ordinary), ("copy-heavy", copying)):
                llm.budget = 0
                plain = measure(llm, "sibling", asked, samplings, session)
                llm.budget = budget
                base: np.ndarray | None = None
                for source in SOURCES:
                    answers = measure(llm, source, asked, samplings, session)
                    rows = np.array([[len(one.tokens), one.sweeps] for one in answers])
                    base = rows if base is None else base
                    equal = sum(one.tokens == text.tokens for one, text in zip(answers, plain, strict=True))
                    speed = rows[:, 0].sum() / rows[:, 1].sum()
                    cells = (name, f"{warmth:g}", source, f"{speed:.2f}", ratio(rows, base), f"{equal} of {len(rows)}")
                    click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
