"""`specexec distill model`: a small model of the same tokens, trained on what `distill record` has kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cli.distill.options import training_options
from cli.distill.progress import follow
from cli.distill.room import check_room
from cli.engine.imports import lean_imports
from cli.shared.control_codes import echo
from cli.shared.quantities import format_count
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen
from offload.checkpoint.documents import check_documents
from offload.hub.names import resolve
from offload.machine.atomic_write import replace_with

if TYPE_CHECKING:
    from cli.distill.options import TrainingOptions


@click.command()
@training_options
@click.option(
    "--from", "small", metavar="MODEL", required=True, help="The small model to begin with: a name or a folder."
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@json_option()
@verbosity_options
@click.pass_obj
def model(verbosity: Verbosity, training: TrainingOptions, small: str, offline: bool, as_json: bool) -> int:
    """Train a small model further, on what was RECORDED of a large one with the same tokens, to guess better for it.

    \b
      specexec distill model recorded --from ./small -o small-for-mine
      specexec chat -m ./mine -d ./small-for-mine

    The same command again continues where it was stopped. The folder is one of transformers.
    """
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity, screen.tell)
    with screen.status(lambda: f"reading {small}…"), lean_imports():
        from specexec.compose.small_model import opened
        from specexec.distill.batches import Texts
        from specexec.distill.recording import Recording
        from specexec.distill.small_model import train_model, usual_rate
        from specexec.distill.training import TrainingPlan

        recording = Recording.open(training.recorded, replace_with)
        training.begin()
        folder = resolve(small, offline=offline).target
        check_documents(folder)
        texts = Texts.of(recording, training.length)
        student, tokenizer = opened(folder, recording.target, training.loss)
        plan = TrainingPlan(training.epochs, training.batch, training.rate or usual_rate(student), training.seed)
        device, half = training.computing()
    room = check_room(student, student.memory_B(training.batch), device, training.output)
    trained = sum(one.numel() for one in student.trained.values())
    screen.say(
        f"{small} for {recording.target.name}: {format_count(trained)} numbers to train, {format_count(texts.tokens)} "
        f"tokens of text, {room}"
    )
    seen = follow(train_model(student, texts, plan, training.output, device, half), screen)
    if seen.exit_code:
        screen.say("The same command continues here.")
    else:
        tokenizer.save_pretrained(training.output)
        training.finish()
        screen.say(f"wrote {training.output}. Try: specexec chat -m {recording.target.name} -d {training.output}")
    if as_json:
        said = {"small": str(folder), "offline": offline, "model": recording.target.name, "trained": trained}
        echo(json.dumps(training.facts | said | asdict(seen), ensure_ascii=False))
    return seen.exit_code
