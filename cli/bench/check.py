"""`specexec check`: answer prompts with and without drafting, and show that nothing but speed differs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from cli.bench.prompts import bench_prompts
from cli.engine.facts import facts_of
from cli.engine.open import running_engine
from cli.shared.control_codes import echo
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import EngineOptions, WholeNumber, engine_options, refuse_lossy, sampling_options
from cli.shared.verbosity import Verbosity, json_option, verbosity_options
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.evaluation.audit import Audit

DIFFERENT = 1


@click.command(cls=SectionedCommand)
@click.option("--prompts", "file", type=click.Path(exists=True, path_type=Path), help="A prompt a line (.txt, .jsonl).")
@click.option("--limit", type=WholeNumber(min=1), default=8, help="Prompts to try.")
@json_option("Print JSON, a line for each prompt, each with what came of every option.")
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def check(
    verbosity: Verbosity,
    file: Path | None,
    limit: int,
    as_json: bool,
    engine_options: EngineOptions,
    sampling: SamplingParams,
) -> int:
    """Answer prompts twice, with guesses and one token at a time, and compare the texts.

    In float32 they must be equal. In bf16 and f16 a near-tie may flip when a token is computed among other rows; the
    margin then shows how near. --exact decides near-ties by the text alone, and what that took is reported. Ends with
    1 if any text differs. With --kv-quant it also says how far the texts are from those of whole keys and values.

    \b
      specexec check
      specexec check -m ./my-model -d ./my-drafter --dtype f32 -t 0.8 --limit 20
    """
    from specexec.evaluation.audit import audit

    refuse_lossy(engine_options, "check compares exact texts")
    screen = Screen(quiet=verbosity.quiet)
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, 128))
    found: list[Audit] = []
    with running_engine(engine_options, screen, verbosity, remember=False) as llm:
        began, facts = perf_counter(), {"engine": facts_of(llm, engine_options)}
        for index, prompt in enumerate(bench_prompts(file)[:limit]):
            seed = index if sampling.seed is None else sampling.seed + index
            chosen = llm.filled(replace(sampling, seed=seed))
            one = audit(llm, prompt.asked, chosen)
            found.append(one)
            record = {"prompt": prompt.text} | asdict(one) | {"sampling": asdict(chosen)} | facts
            echo(json.dumps(record) if as_json else _line(prompt.text, one))
        seconds, bill = perf_counter() - began, llm.exact_ties
    equal = sum(one.identical for one in found)
    tokens, sweeps = sum(one.tokens for one in found), sum(one.sweeps for one in found)
    screen.say(f"{equal} of {len(found)} texts identical · {tokens} tokens in {sweeps} sweeps")
    if effects := [one.kv_effect for one in found if one.kv_effect is not None]:
        places = max(sum(one.places for one in effects), 1)
        changed, nats = sum(one.changed for one in effects), sum(one.divergence * one.places for one in effects)
        screen.say(
            f"KV in {engine_options.load.kv_quant} bits: the likeliest token is another one than with whole keys and "
            f"values at {changed} of {places} places · mean divergence {nats / places:.2g} nats"
        )
    if bill is not None:
        screen.say(
            f"exact: {bill.again} of {bill.choices} choices were near-ties, {bill.changed} changed · "
            f"{bill.seconds:.2f} of {seconds:.2f} s · largest rounding {bill.widest:.2g}"
        )
    return 0 if equal == len(found) else DIFFERENT


def _line(prompt: str, one: Audit) -> str:
    shown = prompt if len(prompt) <= 48 else prompt[:47] + "…"
    if one.identical:
        return f"same    {one.tokens:4} tokens  {shown}"
    margin = "one text is longer" if one.margin is None else f"margin {one.margin:.2g}"
    return f"differ  at token {one.first} ({margin})  {shown}"
