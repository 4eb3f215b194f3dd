"""`specexec bench`: the same prompts under every combination of settings, plain decoding always among them."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from cli.bench.plot import check_extra, draw
from cli.bench.prompts import bench_prompts
from cli.bench.rounds import COLUMNS, Row, measure
from cli.bench.rules import measure_rules, two_models
from cli.engine.facts import facts_of
from cli.engine.learned_store import keep_speed
from cli.engine.open import running_engine
from cli.shared.control_codes import echo
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import BUDGET, EngineOptions, RealNumber, WholeNumber, engine_options
from cli.shared.verbosity import Verbosity, json_option, verbosity_options
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams

log = logging.getLogger(__name__)

BUDGETS = ("8", "32", "128")
LOSSY = ["typical", "relaxed"]  # they change the distribution of the text
PLANNER = click.Choice(["best", "reference", "beam", "sequoia"])
RULES = ["walk", "multi-step", "multi-step-distinct", "greedy", "block", *LOSSY]
Command = TypeVar("Command", bound=Callable[..., Any])


class Several(click.ParamType[tuple[str, ...]]):
    """A comma list whose every item is checked as an option of its own would be."""

    name = "list"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not value:
            return ()
        items = value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))
        for item in items:
            self.kind.convert(item, param, ctx)
        return items


def _several(
    name: str, kind: click.ParamType[Any], says: str, default: str = "", shown: str = ""
) -> Callable[[Command], Command]:
    says = f"{says} Comma list."
    return click.option(
        name, type=Several(kind), default=default, show_default=shown or True, metavar="A,B,…", help=says
    )


@click.command(cls=SectionedCommand)
@_several("--budgets", BUDGET, "Guesses per sweep; auto is one too.", shown=",".join(BUDGETS))
@_several("--temperatures", RealNumber(min=0), "0 takes the likeliest token.", default="0")
@_several("--drafters", click.STRING, "Who guesses.", shown="that of --drafter")
@_several(
    "--offloads", click.Choice(["auto", "none", "ram", "disk"]), "Where the weights live.", shown="that of --offload"
)
@click.option("--planner", type=PLANNER, default="best", help="How the tree of guesses grows.")
@_several("--planners", PLANNER, "How trees grow.", shown="that of --planner")
@click.option("--prompts", "file", type=click.Path(exists=True, path_type=Path), help="A prompt a line (.txt, .jsonl).")
@click.option("--limit", type=WholeNumber(min=1), default=8, help="Prompts to use.")
@click.option("-r", "--repeat", type=WholeNumber(min=1), default=3, help="Rounds; the spread is over them.")
@click.option("-n", "--gen", type=WholeNumber(min=1), default=64, help="New tokens for each prompt.")
@click.option(
    "-o", "--output", "form", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="On stdout."
)
@json_option("The same as -o json; errors too.")
@click.option(
    "--rules",
    type=Several(click.Choice(RULES)),
    default="",
    metavar="A,B,…",
    help="Other verification rules, for comparison; above T = 0 only. Comma list.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it, as a PNG at this path.")
@engine_options
@verbosity_options
@click.pass_obj
def bench(
    verbosity: Verbosity,
    budgets: tuple[str, ...],
    temperatures: tuple[str, ...],
    drafters: tuple[str, ...],
    offloads: tuple[str, ...],
    planner: str,
    planners: tuple[str, ...],
    file: Path | None,
    limit: int,
    repeat: int,
    gen: int,
    form: str,
    as_json: bool,
    rules: tuple[str, ...],
    plot: Path | None,
    engine_options: EngineOptions,
) -> int:
    """Measure tokens per sweep and per second for every combination of the comma lists.

    Plain decoding (budget 0) is always measured in the same run, and every text is compared with it. Quote the ratios:
    absolute speeds belong to this machine on this day. The toy's speeds mean nothing; its tokens per sweep do. Nothing
    is remembered from earlier runs or from prompt to prompt, nor kept, but for the speeds of plain decoding and of each
    drafter under --budgets auto: from then on --drafter auto knows them. --rules adds rows that write by other rules of
    verification, over trees of one fixed shape: their texts depend on the tree, so nothing else uses them; typical and
    relaxed accept what the model finds likely enough, and so write other texts than it would.

    \b
      specexec bench --budgets 8,32,128 --temperatures 0,0.8
      specexec bench -m llama-8b --budgets auto --drafters sibling+ngram,substitute+ngram,ngram
      specexec bench --temperatures 1 --rules walk,multi-step,greedy,block
      specexec bench -m ./my-model -d ./my-drafter --offloads ram,disk -o json > bench.json
    """
    if plot is not None:
        check_extra()
    if rules and not any(map(float, temperatures)):
        raise click.UsageError("--rules compares how tokens are drawn: list a temperature above 0 in --temperatures.")
    screen = Screen(quiet=verbosity.quiet)
    asked = bench_prompts(file)[:limit]
    run = {"prompts": "demo" if file is None else str(file), "limit": limit, "repeat": repeat, "gen": gen}
    budgets = _compared(budgets, "budget", engine_options.load.budget, BUDGETS)
    drafters = _compared(drafters, "drafter", engine_options.load.drafter)
    offloads = _compared(offloads, "offload", engine_options.load.offload)
    planners = _compared(planners, "planner", planner)
    rows: list[Row] = []
    for drafter, offload, shape in product(drafters, offloads, planners):
        options = engine_options.but(drafter=drafter, offload=offload)
        with running_engine(options, screen, verbosity, remember=False, planner=shape) as llm:
            engine = facts_of(llm, options)
            del engine["budget"]  # each row has its own
            facts, begun = {"run": run, "engine": engine}, len(rows)
            if rules:
                two_models(llm)  # refused before anything is measured
            for temperature in temperatures:
                sampling = SamplingParams(temperature=float(temperature), max_tokens=gen)
                sizes = ["0", *(size for size in budgets if size != "0")]
                prompts = [prompt.asked for prompt in asked]
                rows += measure(llm, drafter, shape, prompts, sizes, sampling, repeat, screen)
                if rules and sampling.temperature:
                    plain = rows[-len(sizes)]
                    rows += measure_rules(llm, prompts, rules, plain, gen, screen, LOSSY)
            rows[begun:] = [replace(row, facts=facts) for row in rows[begun:]]
            _keep_speed(options, llm.sources, rows[begun:])
    echo(FORMATS["json" if as_json else form](rows), nl=False)
    if plot is not None:
        draw([row for row in rows if not row.planner.startswith("rule")], plot)
    for row in rows:
        if row.vs_plain < 1:
            which = f"{row.asked}, {row.planner}, budget {row.budget}, T = {row.temperature:g}"
            screen.say(f"{which}: slower than plain decoding.")
    return 0


def _keep_speed(options: EngineOptions, sources: str, rows: list[Row]) -> None:
    """What `--drafter auto` would have made of these sources, to choose by; and plain decoding, to warn by."""
    for row in rows:
        if row.planner == "best" and row.budget in ("0", "auto"):
            tokens = row.sweeps * row.tokens_per_sweep
            named = "none" if row.budget == "0" else sources
            try:
                keep_speed(options, named, row.sweeps, tokens, tokens / row.tokens_per_s)
            except OSError as problem:
                log.warning("the speed of %s could not be kept: %s", named, problem)


def _compared(
    listed: tuple[str, ...], name: str, one: object, otherwise: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The items of a list; without one what the option of a single value says, else what is compared by itself."""
    source = click.get_current_context().get_parameter_source
    if listed and source(name) == source(f"{name}s") == ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--{name} is one of --{name}s: give one of the two options.")
    unsaid = source(name) == ParameterSource.DEFAULT
    return listed or (otherwise if otherwise and unsaid else (str(one),))


def _markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    flat = [{name: value for name, value in asdict(row).items() if name != "facts"} for row in rows]
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _record(row: Row) -> dict[str, object]:
    record = asdict(row)
    return record | record.pop("facts")


FORMATS = {
    "md": _markdown,
    "csv": _csv,
    "json": lambda rows: json.dumps([_record(row) for row in rows], indent=2) + "\n",
    "jsonl": lambda rows: "".join(json.dumps(_record(row)) + "\n" for row in rows),
}
