"""`specexec generate`: answer many prompts, one record each; a bad one costs itself and nothing else."""

from __future__ import annotations

import secrets
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.engine import running_engine
from cli.errors import BAD_INPUT, INTERRUPTED, REFUSALS, SOME_FAILED, exit_code
from cli.interrupts import Interrupts
from cli.options import EngineOptions, engine_options, sampling_options
from cli.prompts import Item, read_items
from cli.records import RecordFile, RecordStream, Sink, TextStream, failed, finished, refuse_existing
from cli.screen import Screen
from cli.verbosity import Verbosity, verbosity_options
from specexec.sampling import SamplingParams

if TYPE_CHECKING:
    from specexec.engine import Engine
    from specexec.stats import Completion

REPORT_EVERY_S = 30.0


@click.command()
@click.argument("inputs", nargs=-1, metavar="[INPUT]...", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON lines to this file.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Without -o: print JSON lines, not just the text.")
@click.option("--field", metavar="NAME", show_default="prompt, messages or text", help="Which field holds the prompt.")
@click.option("--chat/--raw", default=True, help="Apply the chat template, or continue the prompt as it is.")
@click.option("--strict", is_flag=True, help="Stop at the first bad prompt.")
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def generate(
    verbosity: Verbosity,
    inputs: tuple[str, ...],
    prompts: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    field: str | None,
    chat: bool,
    strict: bool,
    engine_options: EngineOptions,
    sampling: SamplingParams,
) -> int:
    """Answer every prompt of INPUT: .jsonl is one prompt a line, any other file is one prompt, - is standard input.

    \b
      specexec generate -p "List the seasons."
      specexec generate prompts.jsonl notes/*.txt -o out.jsonl
    """
    if not prompts and not inputs:
        raise click.UsageError("Nothing to answer. Name an input file, - for standard input, or use -p.")
    items = read_items(prompts, inputs, field=field, chat=chat)
    if output is not None:
        refuse_existing(output, overwrite=overwrite)
        if any(Path(path).resolve() == output.resolve() for path in inputs):
            raise click.UsageError(f"{output} is also an input.")
    bad = next((item.problem for item in items if item.problem), None)
    if strict and bad is not None:
        raise bad
    screen = Screen(quiet=verbosity.quiet)
    with running_engine(engine_options, screen, verbosity) as engine, _sink(output, overwrite, as_json, screen) as sink:
        run = Run(engine, sampling, sink, screen, strict)
        code = run.answer(items)
        screen.say(run.summary())
    return code


def _sink(output: Path | None, overwrite: bool, as_json: bool, screen: Screen) -> AbstractContextManager[Sink]:
    if output is not None:
        return RecordFile(output, overwrite=overwrite)
    return nullcontext(RecordStream(screen) if as_json else TextStream(screen))


@dataclass
class Run:
    """One pass over the items, and what has come of it so far."""

    engine: Engine
    sampling: SamplingParams
    sink: Sink
    screen: Screen
    strict: bool
    total: int = 0
    done: int = 0
    begun: int = 0
    failed: int = 0
    tokens: int = 0
    sweeps: int = 0

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed
        self._started_s = time.perf_counter()

    def answer(self, items: list[Item]) -> int:
        """Answer the items in order and return the exit code. Ctrl-C ends after the current layer, text kept."""
        self.total = len(items)
        with Interrupts(self.engine.stop, lambda: self.screen.tell("stopping…")) as interrupts:
            try:
                with self.screen.status(self.progress, plain_every_s=REPORT_EVERY_S):
                    for item in items:
                        self._answer(item)
                        if interrupts.exit_code:
                            return interrupts.exit_code
            except KeyboardInterrupt:
                return INTERRUPTED
        return SOME_FAILED if self.failed else 0

    def _answer(self, item: Item) -> None:
        from specexec.noise import derived_seed

        try:
            if item.problem:
                raise item.problem
            # The seed belongs to the item, so that its text depends on no other item and no order.
            sampling = replace(self.sampling, seed=derived_seed(self.seed, item.id))
            completion = self.engine.generate(item.prompt, sampling)
        except REFUSALS as refusal:
            if exit_code(refusal) != BAD_INPUT or self.strict:
                raise
            self.failed += 1
            self.screen.tell(f"{item.id}: {refusal.what}" if item.id not in refusal.what else refusal.what)
            self.sink.put(failed(item.id, refusal))
        else:
            self._keep(item, completion)

    def _keep(self, item: Item, completion: Completion) -> None:
        if completion.finish_reason != "interrupted":
            self.done += 1
        elif completion.tokens:
            self.begun += 1
        else:
            return  # stopped before its first token: the item counts as not begun
        self.tokens += len(completion.tokens)
        self.sweeps += completion.sweeps
        self.sink.put(finished(item.id, completion))

    def progress(self) -> str:
        """Where the run is: items as a bar, then the layer under way and the speed so far."""
        from tqdm import tqdm  # a tenth of a second that --help need not pay

        now = self.engine.progress()
        spent_s = time.perf_counter() - self._started_s
        facts = f"layer {now.layer}/{now.layers} · {self._speed(spent_s)}"
        bar = "{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt} items · {elapsed}<{remaining} · " + facts
        return tqdm.format_meter(self.done + self.failed, self.total, spent_s, bar_format=bar)

    def summary(self) -> str:
        """What came of it."""
        counts = {"answered": self.done, "in part": self.begun, "failed": self.failed}
        facts = [f"{count} {what}" for what, count in counts.items() if count or what == "answered"]
        left = self.total - sum(counts.values())
        facts += [f"{left} not begun"] if left else []
        facts.append(self._speed(time.perf_counter() - self._started_s))
        return " · ".join(facts + ([f"seed {self.seed}"] if self.sampling.temperature != 0 else []))

    def _speed(self, spent_s: float) -> str:
        per_sweep = self.tokens / max(self.sweeps, 1)
        return f"{self.tokens} tokens · {self.tokens / max(spent_s, 1e-9):.1f} tok/s · {per_sweep:.1f} tok/sweep"
