"""`specexec distill record`: a model answers prompts, and what training a drafter needs of that is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.batch.input.form import Form
from cli.batch.input.inputs import read_inputs
from cli.batch.preparation import Preparation
from cli.distill.options import hold
from cli.engine.facts import facts_of
from cli.engine.open import running_engine
from cli.shared.control_codes import echo
from cli.shared.errors import SOME_FAILED, OutputDiskFull
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import EngineOptions, WholeNumber, engine_options, refuse_lossy, sampling_options
from cli.shared.quantities import format_bytes, format_count
from cli.shared.verbosity import Verbosity, json_option, verbosity_options
from cli.terminal.interrupts import Interrupts
from cli.terminal.screen import Screen
from offload.machine.atomic_write import replace_with
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.distill.recording import Recording
    from specexec.engine.engine import Engine
    from specexec.engine.request_types import Request

_FOLDER = click.Path(path_type=Path, file_okay=False)
REPORT_EVERY_S = 30.0


class Layers(click.ParamType[tuple[int, ...]]):
    """Numbers of layers, joined by commas."""

    name = "n,n,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(one) for one in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} are no layers: numbers joined by commas, such as 2,15,27.", param, ctx)


@click.command(cls=SectionedCommand)
@click.option(
    "--prompts", required=True, multiple=True, metavar="FILE", help="Prompts, in any form that generate takes."
)
@click.option("-o", "--output", type=_FOLDER, required=True, help="The folder to record into.")
@click.option("--top", type=WholeNumber(min=1), default=64, help="Likeliest next tokens to keep of each place.")
@click.option(
    "--layers",
    type=Layers(),
    show_default="three, early, middle and late",
    help="Layers whose inputs a head will read.",
)
@click.option("--chat/--raw", default=True, help="Apply the chat template, or continue the text as it is.")
@click.option(
    "--split",
    type=click.Choice(["file", "lines", "blank"]),
    default="lines",
    help="Where a prompt ends in files other than .jsonl.",
)
@click.option("--limit", type=WholeNumber(min=1), help="Only the first N prompts.")
@json_option()
@engine_options
@sampling_options
@verbosity_options
@click.pass_obj
def record(
    verbosity: Verbosity, engine_options: EngineOptions, sampling: SamplingParams, prompts: tuple[str, ...],
    output: Path, top: int, layers: tuple[int, ...] | None, chat: bool, split: str, limit: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Let the model answer prompts and keep its texts, what flows into some of its layers, and its likeliest tokens.

    \b
      specexec distill record -m ./mine --prompts prompts.txt -o recorded -n 256
      specexec distill record -m llama-70b --offload ram --prompts prompts.jsonl -o recorded

    The same command again continues where it was stopped, and takes prompts that were added to the end. What is
    recorded is the model's own text, whatever drafts. Ordinary prompts, like those it will be asked, teach most; some
    hundred are a beginning, some thousand are better.
    """
    refuse_lossy(engine_options, "a drafter learns from the model's own texts")
    found = read_inputs((), prompts, Form(chat=chat), split=split, limit=limit)  # type: ignore[arg-type]  # click has checked
    if not found.items:
        raise click.UsageError(f"{', '.join(prompts)}: no prompts were found.")
    if bad := next((item.problem for item in found.items if item.problem), None):
        raise bad
    hold(output)
    screen = Screen(quiet=verbosity.quiet)
    sampling = replace(sampling, seed=sampling.seed or 0)
    with running_engine(engine_options, screen, verbosity) as engine:
        from specexec.distill.record import check_taps, target_of, usual_taps
        from specexec.distill.recording import Recording

        target = target_of(engine, _name(engine_options.model))
        taps = layers or usual_taps(target.layers)
        check_taps(taps, target.layers)
        how = {name: value for name, value in asdict(engine.filled(sampling)).items() if name != "grammar"}
        recording = Recording(output, target, taps, min(top, target.vocabulary), how, replace_with)
        preparation = Preparation(engine.encoding)
        requests = [one for item in found.items for one in preparation.requests(item, sampling)]
        requests = [replace(request, index=index) for index, request in enumerate(requests)]
        facts: dict[str, object] = {
            "output": str(output), "chat": chat, "split": split, "prompts": len(requests),
            "layers": list(taps), "top": recording.top,
            "token_B": recording.token_B, "sampling": how, "engine": facts_of(engine, engine_options),
        }  # fmt: skip
        done, code = _record(engine, requests, recording, screen)
    if as_json:
        echo(json.dumps(facts | done, ensure_ascii=False))
    return code


def _name(model: str) -> str:
    """What a folder is called from everywhere; other names as they are."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _record(
    engine: Engine, requests: Sequence[Request], recording: Recording, screen: Screen
) -> tuple[dict[str, object], int]:
    from specexec.distill.record import left_to_record, record

    recording.begin(engine.shared_tensors())
    todo = left_to_record(recording, requests)
    _check_space(recording, _lengths(engine, todo), screen)
    if len(todo) < len(requests):
        screen.say(f"{recording.folder}: {len(requests) - len(todo)} texts are there, {len(todo)} to do")
    texts = tokens = answers = failed = growing = 0
    began_s = time.perf_counter()

    def progress() -> str:
        spent_s = time.perf_counter() - began_s
        left = "" if not texts else f", about {spent_s / texts * (len(todo) - texts - failed) / 60:.0f} min left"
        more = f", {format_count(growing)} more on their way" if growing else ""
        return f"{texts} of {len(todo)} texts recorded, {format_count(answers)} tokens of answers{more}{left}"

    with (
        Interrupts(engine.stop, lambda: screen.tell("stopping…")) as interrupts,
        screen.status(progress, plain_every_s=REPORT_EVERY_S),
    ):
        for one in record(engine, todo, recording):
            texts, tokens, answers = texts + one.texts, tokens + one.tokens, answers + one.answer_tokens
            growing = one.growing
            if one.failure is not None:
                failed += 1
                screen.tell(f"prompt {one.failure[0]}: {one.failure[1].what}")
    spent_s = time.perf_counter() - began_s
    screen.say(
        f"recorded {texts} texts, {format_count(answers)} tokens of answers, "
        f"{format_bytes(tokens * recording.token_B)}, in {spent_s:.0f} s"
    )
    done: dict[str, object] = {
        "recorded": texts, "tokens": tokens, "answer_tokens": answers, "failed": failed, "seconds": round(spent_s, 3),
    }  # fmt: skip
    if interrupts.exit_code:
        screen.say("What was recorded is kept. The same command continues.")
        return done, interrupts.exit_code
    return done, SOME_FAILED if failed else 0


def _lengths(engine: Engine, requests: Sequence[Request]) -> list[int]:
    """Tokens that each text may come to have."""
    prompts = (len(engine.encode(one.prompt, one.wishes)) for one in requests)
    return [min(many + one.sampling.max_tokens, engine.context) for many, one in zip(prompts, requests, strict=True)]


def _check_space(recording: Recording, lengths: Sequence[int], screen: Screen) -> None:
    """Say what the texts may take, and refuse what the disk cannot hold."""
    most_B, free_B = sum(lengths) * recording.token_B, shutil.disk_usage(recording.folder).free
    screen.say(
        f"{recording.folder}: {format_bytes(recording.token_B)} a token, at most {format_bytes(most_B)} for "
        f"{len(lengths)} texts; {format_bytes(free_B)} are free"
    )
    if most_B > free_B:
        raise OutputDiskFull(
            f"{recording.folder} may come to take {format_bytes(most_B)}, and {format_bytes(free_B)} are free.",
            why=f"{sum(lengths):,} tokens of {format_bytes(recording.token_B)}, if answers are as long as they may.",
            hint="-n for shorter answers, a smaller --top, --limit for fewer prompts, or another disk.",
        )
