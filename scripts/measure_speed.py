"""Tokens per second from a disk, end to end: plain decoding, ours, ours without drafting ahead, assisted generation.

Every prompt of prompts.jsonl goes through each of them, in an order that rotates, so that other load on the
machine falls on all alike. Each has an engine of its own and knows only what it has learned itself, as if no
other way was tried in between. Greedy, first sweep and prompt included, nothing left out but one prompt to warm up.
The rival is transformers' `generate(assistant_model=…)` with its own schedule of guesses, over the same streamed
layers, so that only the way of guessing differs. A plain sweep gives one token whatever the prompt: `--plain-tokens` of
them say what all would. Speeds are tokens / seconds of all prompts together; ratios have a 95 % interval from a
bootstrap over prompts. Look-ups (`--drafter FOLDER+ngram`) find what is in the prompt and its own answer, nothing
else.

    python scripts/inflate.py build/1b --shape 1b
    python scripts/measure_speed.py build/1b --drafter offload/demo/drafter
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import torch
from bootstrap import ratio
from measure_trees import prompts
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import offload
import specexec
from cli.shared.options import BUDGET, IntOrAuto
from specexec import SamplingParams
from specexec.engine.engine import Engine
from specexec.text.messages import Prompt

Run = Callable[[Prompt, int], tuple[list[int], float]]  # a prompt and how many tokens → the tokens, and tokens a sweep


def ours(llm: Engine, ahead: bool | None) -> Run:
    """This engine; drafting ahead during sweeps, or not, or where it pays."""
    llm._decoder.overlap = ahead

    def run(prompt: Prompt, tokens: int) -> tuple[list[int], float]:
        if llm.memory is not None:
            llm.memory.forget_past()  # not what other prompts brought
        answer = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=tokens))
        return list(answer.tokens), answer.tokens_per_sweep

    return run


def assisted(folder: Path, drafter: Path, encode: Callable[[Prompt], list[int]], link_limit: float | None) -> Run:
    """transformers' assisted generation over our stream of the same checkpoint."""
    target = offload.load(folder, "disk", ctx=2048, link_limit_Bps=link_limit)
    assistant = AutoModelForCausalLM.from_pretrained(drafter, dtype=target.dtype)
    stream = offload.stream_of(target)

    def run(prompt: Prompt, tokens: int) -> tuple[list[int], float]:
        ids = torch.tensor([encode(prompt)])
        before = stream.stats().layers_read
        written = target.generate(  # type: ignore[operator]  # transformers does not type its mixins
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, assistant_model=assistant
        )[0, ids.shape[1] :].tolist()
        return written, len(written) * stream.layers / (stream.stats().layers_read - before)

    return run


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--drafter", required=True, help="A folder; other sources may be joined to it, as FOLDER+ngram.")
@click.option("--tokens", default=32, show_default=True, help="New tokens for each prompt.")
@click.option("--plain-tokens", default=4, show_default=True, help="Of these, so many by plain decoding.")
@click.option("--every", default=1, show_default=True, help="Every so many-th prompt of the list.")
@click.option("--budget", type=BUDGET, default="auto", show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads of the arithmetic.")
@click.option("--link-limit", type=float, help="Bytes per second at most.")
def main(
    folder: Path,
    drafter: str,
    tokens: int,
    plain_tokens: int,
    every: int,
    budget: IntOrAuto,
    threads: int,
    link_limit: float | None,
) -> None:
    """Measure the model in FOLDER."""
    torch.set_num_threads(threads)
    asked = prompts()[::every]
    with ExitStack() as engines:

        def loaded(drafter: str) -> Engine:
            llm = specexec.load(
                str(folder), drafter=drafter, budget=budget, offload="disk", ctx=2048, link_limit_Bps=link_limit
            )
            return engines.enter_context(llm)

        bare, first, second = loaded("none"), loaded(drafter), loaded(drafter)
        ways = {
            "plain": ours(bare, False),
            "ours": ours(first, None),
            "ours, never ahead": ours(second, False),
            "assisted generation": assisted(folder, Path(drafter.split("+")[0]), first.encode, link_limit),
        }
        found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in ways}
        differ = 0
        for run in ways.values():
            run("A prompt that warms up the machine", 8)
        for index, prompt in enumerate(tqdm(asked)):
            texts: dict[str, list[int]] = {}
            for name in np.roll(list(ways), index):
                way, began_s = ways[name], time.perf_counter()
                texts[name], per_sweep = way(prompt, plain_tokens if name == "plain" else tokens)
                found[name].append((len(texts[name]), time.perf_counter() - began_s, per_sweep))
            differ += (
                texts["plain"] != texts["ours"][: len(texts["plain"])] or texts["ours"] != texts["ours, never ahead"]
            )
        click.echo(f"{len(asked)} prompts, {tokens} tokens each, {folder.name}, {first.placement}\n")
    click.echo("| way | tokens/s | against plain | against never ahead | tokens/sweep |")
    click.echo("|---|---|---|---|---|")
    rows = {name: np.array(each) for name, each in found.items()}
    for name, each in rows.items():
        speed = each[:, 0].sum() / each[:, 1].sum()
        sweeps = each[:, 0].sum() / (each[:, 0] / each[:, 2]).sum()
        plain, serial = (ratio(each[:, :2], rows[other][:, :2]) for other in ("plain", "ours, never ahead"))
        click.echo(f"| {name} | {speed:.2f} | {plain} | {serial} | {sweeps:.2f} |")
    click.echo(f"\n{differ} of {len(asked)} texts differ between our own rows")


if __name__ == "__main__":
    main()
