"""`specexec distill head`: a head that drafts, trained on what `distill record` has kept."""

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
from cli.shared.options import COUNT
from cli.shared.quantities import format_count
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen
from offload.machine.atomic_write import replace_with

if TYPE_CHECKING:
    from cli.distill.options import TrainingOptions
    from specexec.distill.heads import HeadKind

KINDS = ("eagle3", "dflash", "mtp")


@click.command()
@training_options
@click.option("--kind", type=click.Choice(KINDS), default="eagle3", help="What head.")
@click.option(
    "--draft-vocab", type=COUNT, default="32k", help="Frequent tokens that it can name, such as 8k; mtp names all."
)
@json_option()
@verbosity_options
@click.pass_obj
def head(verbosity: Verbosity, training: TrainingOptions, kind: HeadKind, draft_vocab: int, as_json: bool) -> int:
    """Train a head that guesses from the model's hidden states, on what was RECORDED.

    eagle3 is one layer that reads three layers of the model and then its own guesses; mtp one that reads what the last
    layer makes; dflash three layers that guess seven tokens in one pass.

    \b
      specexec distill head recorded -o mine-head
      specexec distill head recorded --kind dflash -o mine-block
      specexec chat -m ./mine -d ./mine-head

    The same command again continues where it was stopped. The folder is in the layout of `speculators`.
    """
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity, screen.tell)
    with screen.status(lambda: f"reading {training.recorded}…"), lean_imports():
        from specexec.distill.batches import Texts
        from specexec.distill.heads import HeadTraining, usual_rate
        from specexec.distill.recording import Recording
        from specexec.distill.training import TrainingPlan

        recording = Recording.open(training.recorded, replace_with)
        training.begin()
        texts = Texts.of(recording, training.length)
        rate = training.rate or usual_rate(recording.target.hidden)
        plan = TrainingPlan(training.epochs, training.batch, rate, training.seed)
        whole = HeadTraining(recording, texts, plan, draft_vocab, training.loss, kind)
        student = whole.student()
        device, half = training.computing()
    room = check_room(student, whole.memory_B(student), device, training.output)
    trained = sum(one.numel() for one in student.trained.values())
    screen.say(
        f"{kind} for {recording.target.name}: {format_count(trained)} numbers to train, {student.shared.names} tokens "
        f"to name, {format_count(texts.tokens)} tokens of text, {room}"
    )
    seen = follow(whole.run(student, training.output, device, half), screen)
    if seen.exit_code:
        screen.say("The same command continues here.")
    else:
        training.finish()
        screen.say(f"wrote {training.output}. Try: specexec chat -m {recording.target.name} -d {training.output}")
    if as_json:
        said = {"kind": kind, "draft_vocab": draft_vocab, "model": recording.target.name, "trained": trained}
        echo(json.dumps(training.facts | said | asdict(seen), ensure_ascii=False))
    return seen.exit_code
