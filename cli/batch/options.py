"""The options of `specexec generate` that are about items and files; engine and sampling have their own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

import click

from cli.batch.input.fitting import TooLong
from cli.batch.input.form import Form, template_problem
from cli.batch.input.inputs import InputShard, Split
from cli.batch.output.formats import Format
from cli.batch.output.journal import RECORDS
from cli.connect.server import server_options
from cli.shared.options import PARALLEL, TEXT_OR_FILE, IntOrAuto, TextOrFile, WholeNumber
from cli.shared.verbosity import json_option

Result = TypeVar("Result")


class ShardType(click.ParamType[InputShard]):
    """`2/4`: the second of four parts."""

    name = "K/N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> InputShard:
        if isinstance(value, InputShard):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value} is not a part; write 1/4 … 4/4.", param, ctx)
        return InputShard(int(match[1]), int(match[2]))


class Template(TextOrFile):
    """A text that can be filled in."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        if problem := template_problem(text):
            self.fail(problem, param, ctx)
        return text


@dataclass(frozen=True)
class BatchOptions:
    """Which items, how they become prompts, where the results go, and what to do about earlier ones."""

    output: Path | None
    output_dir: Path | None
    output_format: Format | None
    as_json: bool
    resume: bool
    retry_failed: bool
    overwrite: bool
    strict: bool
    dry_run: bool
    split: Split
    field: str | None
    template: str | None
    system: str | None
    chat: bool
    limit: int | None
    shard: InputShard
    dedupe: bool
    on_too_long: TooLong
    think: Literal["auto", "off", "on", "low", "medium", "high"]
    parallel: IntOrAuto
    connect: str | None
    api_key: str | None
    engine: Literal["local", "ray"]
    ray_address: str | None
    workers: IntOrAuto

    @property
    def form(self) -> Form:
        """How a text becomes a prompt."""
        return Form(self.field, self.template, self.system, self.chat)

    @property
    def journal(self) -> Path | None:
        """The file of records, if there is one."""
        return self.output_dir / RECORDS if self.output_dir is not None else self.output

    @property
    def format(self) -> Format:
        """How a record looks."""
        if self.output_format in (None, "text"):
            return "jsonl"
        return self.output_format

    def check(self) -> None:
        """Refuse what contradicts itself."""
        file = self.journal is not None
        clashes = [
            (self.output is not None and self.output_dir is not None, "-o and --output-dir name two places."),
            (self.output is not None and self.output_format == "text", "Text goes to --output-dir, not into one file."),
            (self.output_dir is not None and self.output_format == "openai-batch", "--output-dir holds texts."),
            (self.resume and self.overwrite, "--resume keeps what --overwrite throws away."),
            (not file and (self.resume or self.retry_failed), "There is nothing to resume without -o or --output-dir."),
            (self.engine == "local" and self.ray_address is not None, "--ray-address goes with --engine ray."),
            (self.connect is not None and self.engine == "ray", "--connect and --engine ray are two places to write."),
            (
                self.connect is not None and self.dry_run,
                "--dry-run needs the model's files here: leave out --connect.",
            ),
            (
                self.connect is not None and self.on_too_long != "error",
                f"--on-too-long {self.on_too_long} needs the model's tokenizer here: leave out --connect.",
            ),
            (self.system is not None and not self.chat, "--system needs the chat template; leave out --raw."),
        ]
        for clash, says in clashes:
            if clash:
                raise click.UsageError(says)


_FILE = click.Path(path_type=Path, dir_okay=False)
_OPTIONS = (
    click.option("-o", "--output", type=_FILE, help="Write records to this file, one line each, as they finish."),
    click.option("--output-dir", type=click.Path(path_type=Path, file_okay=False),
                 help="Write each text to a file of its own here."),
    click.option("--output-format", type=click.Choice(["jsonl", "openai-batch", "text"]), show_default="jsonl",
                 help="How results look."),
    json_option("Without -o: print JSON lines, each with what came of every option."),
    click.option("--resume", is_flag=True, help="Continue the output of an earlier run, in mid-answer if need be."),
    click.option("--retry-failed", is_flag=True, help="Like --resume, and answer the failed items again."),
    click.option("--overwrite", is_flag=True, help="Replace the output file if it exists."),
    click.option("--strict", is_flag=True, help="Stop at the first bad prompt."),
    click.option("--dry-run", is_flag=True, help="Count items and tokens; load no weights, write nothing."),
    click.option("--split", type=click.Choice(["file", "lines", "blank"]), default="file",
                 help="One prompt per text file, per line, or per block between blank lines."),
    click.option("--field", metavar="NAME", show_default="prompt, messages or text",
                 help="Which field holds the prompt."),
    click.option("--template", type=Template(),
                 help="Put the text into this, a jinja template: 'Summarise: {{ text }}'. Fields of a line work too."),
    click.option("-s", "--system", type=TEXT_OR_FILE, help="System message of every prompt that has none."),
    click.option("--chat/--raw", default=True, help="Apply the chat template, or continue the prompt as it is."),
    click.option("--limit", type=WholeNumber(min=1), metavar="N", help="Only the first N items."),
    click.option("--shard", type=ShardType(), default="1/1", help="Only every N-th item, from the K-th on."),
    click.option("--dedupe", is_flag=True, help="Answer prompts that are the same in every respect only once."),
    click.option("--on-too-long", type=click.Choice(["error", "left", "skip"]), default="error",
                 help="Prompts that the context cannot hold: an error each, cut from the left, or left out."),
    click.option("--think", type=click.Choice(["auto", "off", "on", "low", "medium", "high"]), default="auto",
                 help="How much to think before an answer, if the chat template can vary it; auto: its default."),
    click.option("--parallel", type=PARALLEL, default="auto", help="Answers that share a sweep, at most."),
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local",
                 help="Here, or over a Ray cluster: one engine for each GPU or machine."),
    click.option("--ray-address", metavar="ADDRESS", show_default="a cluster of this machine",
                 help="The cluster to join, such as auto or ray://host:10001."),
    click.option("--workers", type=PARALLEL, default="auto", help="Engines of the cluster."),
)  # fmt: skip


def batch_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add them all; the command receives one `batch: BatchOptions`."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        chosen = {field.name: arguments.pop(field.name) for field in fields(BatchOptions)}
        batch = BatchOptions(**chosen)  # type: ignore[arg-type]  # click has checked them
        batch.check()
        return command(batch=batch, **arguments)

    decorated: Callable[..., Result] = collected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return server_options(None)(decorated)
