"""`specexec generate`: answer many prompts, one record each; a bad one costs itself and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.batch.cluster import Cluster, running_cluster
from cli.batch.input.fitting import fitted
from cli.batch.input.inputs import STDIN, read_inputs
from cli.batch.input.items import Item, Json
from cli.batch.options import BatchOptions, batch_options
from cli.batch.output.formats import Record, RecordWriter
from cli.batch.output.journal import Beside, Journal, open_journal
from cli.batch.output.manifest import Manifest, read_manifest
from cli.batch.output.partial import Begun, PartialFile
from cli.batch.output.sinks import AnswerFolder, JournalSink, ScreenSink
from cli.batch.preparation import Preparation
from cli.batch.run import Prepares, Run
from cli.batch.served import ServedWork
from cli.connect.models import loaded_model
from cli.connect.server import Server, say_without_effect
from cli.engine.facts import facts_of
from cli.engine.imports import lean_imports
from cli.engine.open import open_engine, running_engine
from cli.engine.revision import fingerprint
from cli.shared.errors import INTERRUPTED, SOME_FAILED, TERMINATED
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import EngineOptions, engine_options, model_was_named, prefix_cache_option, sampling_options
from cli.shared.presets import preset_option
from cli.shared.quantities import in_json
from cli.shared.template_options import set_template, template_options
from cli.shared.verbosity import Verbosity, start_logging, verbosity_options
from cli.terminal.screen import Screen
from offload.checkpoint.headers import read_config
from offload.hub.names import resolve
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.text.tokenizer import Encoding


@click.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="[INPUT]...", type=click.Path(exists=True, allow_dash=True))
@preset_option
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@batch_options
@template_options
@prefix_cache_option
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def generate(
    verbosity: Verbosity,
    inputs: tuple[str, ...],
    prompts: tuple[str, ...],
    batch: BatchOptions,
    engine_options: EngineOptions,
    sampling: SamplingParams,
) -> int:
    """Answer every prompt of INPUT: .jsonl is one prompt a line (our own fields or OpenAI's batch format), any other
    file is one prompt or, with --split, many; a folder is all such files in it; - is standard input.

    \b
      specexec generate -p "List the seasons."
      specexec generate prompts.jsonl notes/*.txt -o out.jsonl
      specexec generate prompts.jsonl -o out.jsonl --resume      continue after a crash, or Ctrl-C
    """
    if not prompts and not inputs:
        raise click.UsageError("Nothing to answer. Name an input, - for standard input, or use -p.")
    _check_apart(inputs, batch)
    found = read_inputs(
        prompts, inputs, batch.form, split=batch.split, limit=batch.limit, shard=batch.shard, dedupe=batch.dedupe
    )
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity, screen.tell)
    if found.skipped:
        screen.say(f"files left out, of other kinds or written by a run: {found.skipped}")
    if not found.items:
        screen.say("no prompts were found")
    if answered := sum(item.answered for item in found.items):
        screen.say(f"lines that bring an answer to their last question, which is left out: {answered}")
    served = _served(batch, engine_options, screen)
    if served is not None:
        engine_options = replace(engine_options, model=served.model.name).but(lossy=served.model.lossy)
    items = _fitted(found.items, batch, engine_options, sampling, screen)
    if batch.dry_run:
        return _dry_run(items, batch, engine_options, sampling, screen)
    bad = next((item.problem for item in items if item.problem), None)
    if batch.strict and bad is not None:
        raise bad
    revision = (
        fingerprint(_target(engine_options), engine_options.load.lora) if served is None else served.model.revision
    )
    plan = _plan(items, batch, engine_options, sampling, revision, screen)
    with plan.journal as journal:
        earlier = len(items) - len(plan.todo)
        if journal is not None and (earlier or plan.begun):
            screen.say(f"{journal.path}: {earlier} finished, {len(plan.begun)} in part, {len(plan.todo)} to do")
        if not plan.todo:
            return SOME_FAILED if plan.missed else 0
        with nullcontext(served) if served else _engine(batch, engine_options, screen, verbosity) as engine:
            writer = plan.writer
            if batch.as_json and journal is None:
                writer = replace(writer, facts=_facts(engine, batch, engine_options, plan.sampling))
            sink = plan.sink(journal, writer, batch, screen)
            preparation = _preparation(engine, batch, engine_options, screen)
            run = Run(
                engine, preparation, plan.sampling, sink, screen, batch.parallel, batch.strict,
                partial=plan.partial, begun=plan.begun, missed=plan.missed,
                earlier=earlier - plan.missed,
            )  # fmt: skip
            code = run.answer(plan.todo)
            if isinstance(sink, ScreenSink):
                sink.flush()
            screen.say(run.summary())
    if code in (INTERRUPTED, TERMINATED) and journal is not None:
        screen.say("Nothing is lost. Continue with the same command and --resume.")
    elif code == SOME_FAILED and journal is not None:
        screen.say(f'Errors are in {journal.path} with "error"; answer those again with --retry-failed.')
    return code


def _fitted(
    items: list[Item], batch: BatchOptions, options: EngineOptions, sampling: SamplingParams, screen: Screen
) -> list[Item]:
    """The items as they go into the run, too long ones dealt with."""
    if batch.on_too_long == "error":  # the engine finds them, and each is a record
        return items
    fits = fitted(items, *_reading(options), sampling, batch.on_too_long)
    for count, what in ((fits.cut, "cut from the left"), (fits.skipped, "left out")):
        if count:
            screen.say(f"prompts longer than the context: {count} {what}")
    return fits.items


def _target(options: EngineOptions) -> Path:
    """The model's folder. Raises, before anything is written, for what is there instead of one."""
    target = resolve(options.model, offline=options.load.offline, code=options.load.trust_remote_code).target
    read_config(target)
    return target


def _reading(options: EngineOptions) -> tuple[Encoding, int]:
    """The model's tokenizer, and the tokens that prompt and answer may have together."""
    with lean_imports():
        from specexec.compose.context import context_of, encoding_in

    target, trust = _target(options), options.load.trust_remote_code
    encoding = encoding_in(target, trust)
    set_template(encoding, options.template_vars, options.allow_control_tokens)
    return encoding, context_of(target, options.load.ctx, trust)


def _served(batch: BatchOptions, options: EngineOptions, screen: Screen) -> ServedWork | None:
    """The server that is to write, its model loaded."""
    if batch.connect is None:
        return None
    say_without_effect(screen.tell)
    model = loaded_model(Server(batch.connect, batch.api_key), options.model, model_was_named(), screen)
    screen.say(model.introduction)
    return ServedWork(model, options, None if batch.think == "auto" else batch.think)


def _preparation(
    engine: Engine | Cluster | ServedWork, batch: BatchOptions, options: EngineOptions, screen: Screen
) -> Prepares:
    if isinstance(engine, ServedWork):
        return engine
    with lean_imports():
        from specexec.compose.context import stops_of

    encoding = _reading(options)[0] if isinstance(engine, Cluster) else engine.encoding
    stop = stops_of(_target(options))
    if batch.think == "auto":
        return Preparation(encoding, stop=stop)
    from specexec.text.formats import format_of

    screen.say(f"think {batch.think}: {format_of(encoding).thinking(batch.think).effect}")
    return Preparation(encoding, batch.think, stop)


def _engine(
    batch: BatchOptions, options: EngineOptions, screen: Screen, verbosity: Verbosity
) -> AbstractContextManager[Engine | Cluster]:
    if batch.engine == "local":
        return running_engine(options, screen, verbosity)
    return running_cluster(partial(open_engine, options), batch.ray_address, batch.workers)


@dataclass(frozen=True)
class BatchPlan:
    """What is left to do, and where it goes; decided before any weights are loaded."""

    todo: list[Item]
    sampling: SamplingParams
    writer: RecordWriter
    journal: AbstractContextManager[Journal | None]
    folder: AnswerFolder | None = None
    partial: PartialFile | None = None
    begun: Mapping[str, Begun] = field(default_factory=dict)
    missed: int = 0

    def sink(
        self, journal: Journal | None, writer: RecordWriter, batch: BatchOptions, screen: Screen
    ) -> JournalSink | ScreenSink:
        """Where the results go."""
        if journal is None:
            as_json = batch.as_json or batch.output_format in ("jsonl", "openai-batch")
            return ScreenSink(screen, [item.index for item in self.todo], writer, as_json)
        return JournalSink(journal, writer, self.folder)


def _plan(
    items: list[Item],
    batch: BatchOptions,
    options: EngineOptions,
    sampling: SamplingParams,
    revision: str,
    screen: Screen,
) -> BatchPlan:
    output = batch.journal
    before = (
        None if output is None or not (batch.resume or batch.retry_failed) else read_manifest(Beside(output).manifest)
    )
    sampling = replace(sampling, seed=_seed(sampling, before))
    writer = RecordWriter(batch.format, f"{options.model}@{revision}", batch.dedupe, options.load.lossy)
    if output is None:
        return BatchPlan(items, sampling, writer, nullcontext(None))
    manifest = Manifest.now(_configuration(batch, options, sampling, revision))
    resume, overwrite, retry = batch.resume or batch.retry_failed, batch.overwrite, batch.retry_failed
    folder, ids = None, [item.id for item in items]
    if batch.output_dir is not None and not (resume or overwrite or output.exists()):
        AnswerFolder.of(batch.output_dir, ids).check_new()
    with ExitStack() as undo:
        journal = undo.enter_context(
            open_journal(output, manifest, resume=resume, overwrite=overwrite, retry_failed=retry)
        )
        journal.check_prompts(items)
        if batch.output_dir is not None:
            folder = AnswerFolder.of(batch.output_dir, [*journal.done, *ids])
            if folder.renamed:
                screen.say(f"ids that no file can be called by: {folder.renamed}; each record has the name as 'file'")
        todo = [item for item in items if item.id not in journal.done]
        partial = PartialFile(Beside(output).partial, manifest.sha)
        begun = partial.load({item.id: item for item in todo})
        undo.pop_all()
    missed = sum(journal.done[item.id].failed for item in items if item.id in journal.done)
    return BatchPlan(todo, sampling, writer, journal, folder, partial, begun, missed)


def _facts(
    engine: Engine | Cluster | ServedWork, batch: BatchOptions, options: EngineOptions, sampling: SamplingParams
) -> Callable[[Item], Record]:
    """How an item was to be answered, and the values that the options led to."""
    run = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(batch).items()}
    if isinstance(engine, Cluster | ServedWork):
        about = {"workers": engine.size} if isinstance(engine, Cluster) else engine.model.meta
        where: Record = {"asked": options.asked, **about}
        return lambda item: {"run": run, "sampling": _fields(item.sampling(sampling)), "engine": where}
    here, filled = facts_of(engine, options), engine.filled
    return lambda item: {"run": run, "sampling": _fields(filled(item.sampling(sampling))), "engine": here}


def _fields(sampling: SamplingParams) -> dict[str, object]:
    return asdict(sampling) | {"seed": in_json(sampling.seed or 0)}


def _seed(sampling: SamplingParams, before: Manifest | None) -> int:
    """The seed asked for, that of the run which is resumed, or a fresh one."""
    then = before.configuration.get("--seed") if before is not None else None
    if sampling.seed is not None:
        return sampling.seed
    return then if isinstance(then, int) else secrets.randbits(53)


def _configuration(
    batch: BatchOptions, options: EngineOptions, sampling: SamplingParams, revision: str
) -> dict[str, Json]:
    """Everything a text depends on, by the names a user knows."""
    # An empty option that an older version did not know must not make its files differ from ours.
    given = {name: value for name, value in vars(sampling).items() if name != "stop" and value != ()}
    chosen = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return {
        "--model": options.model,
        "model revision": revision,
        "--dtype": options.load.dtype,
        "--ctx": options.load.ctx,
        "--raw": not batch.chat,
        "--system": batch.system,
        "--template": batch.template,
        "--output-format": batch.format,
        "--stop": list(sampling.stop or ()),
        **({"--lora": list(options.load.lora)} if options.load.lora else {}),
        **({"--head-quant": options.load.head_quant} if options.load.head_quant != "none" else {}),
        **({"--compute": options.load.compute} if options.load.compute != "float" else {}),
        **({"--kv-quant": options.load.kv_quant} if options.load.kv_quant else {}),
        **({"--lossy": [*options.load.lossy]} if options.load.lossy else {}),
        **({"--template-var": dict(options.template_vars)} if options.template_vars else {}),
        **({"--allow-control-tokens": True} if options.allow_control_tokens else {}),
        **({"--exact": True} if options.load.exact else {}),
        **({"--dedupe": True} if batch.dedupe else {}),
        **({"--think": batch.think} if batch.think != "auto" else {}),
        **({"--on-too-long": batch.on_too_long} if batch.on_too_long != "error" else {}),
        **chosen,
    }


def _check_apart(inputs: tuple[str, ...], batch: BatchOptions) -> None:
    """Refuse to write where an input could be replaced by its answer."""
    for path in (Path(path) for path in inputs if path != STDIN):
        if batch.output is not None and path.resolve() == batch.output.resolve():
            raise click.UsageError(f"{path} is also an input.")
        folder = batch.output_dir
        if folder is not None and path.resolve().is_relative_to(folder.resolve()):
            raise click.UsageError(f"The input {path} lies in --output-dir {folder}; name a folder of its own.")


def _dry_run(
    items: list[Item], batch: BatchOptions, options: EngineOptions, sampling: SamplingParams, screen: Screen
) -> int:
    from cli.batch.dryrun import dry_run, expected_tokens, show
    from specexec.engine.batch import MOST_PARALLEL

    target = _target(options)
    parallel = MOST_PARALLEL if batch.parallel == "auto" else batch.parallel
    link_Bps, each = options.load.link_limit_Bps, expected_tokens(options)
    lengths, estimate = dry_run(items, target, *_reading(options), sampling, parallel, link_Bps, each)
    show(lengths, estimate, screen, as_json=batch.as_json)
    return SOME_FAILED if lengths.bad or lengths.too_long else 0
