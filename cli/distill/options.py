"""What the commands that train have in common: which texts, for how long, where it computes and what it becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from filelock import FileLock, Timeout

from cli.shared.errors import OutputFileExists
from cli.shared.options import Device, RealNumber, WholeNumber

if TYPE_CHECKING:
    import torch

    from specexec.distill.divergence import Loss

Result = TypeVar("Result")
_FOLDER = click.Path(path_type=Path, file_okay=False)
LOSSES = ("forward-kl", "reverse-kl", "jsd", "tv", "tv++")


def hold(folder: Path) -> None:
    """Until the command ends no other writes into this folder. Raises OutputFileExists while another does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        click.get_current_context().with_resource(lock)
    except Timeout:
        raise OutputFileExists(
            f"another specexec is writing into {folder}.", hint="wait for it, or another -o."
        ) from None


@dataclass(frozen=True)
class TrainingOptions:
    """By the names that are typed; `rate` is None for one that fits the width."""

    recorded: Path
    output: Path
    epochs: int
    batch: int
    length: int
    rate: float | None
    loss: Loss
    seed: int
    device: str
    overwrite: bool

    @property
    def facts(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"recorded": str(self.recorded), "output": str(self.output)}

    def begin(self) -> None:
        """Refuse an output that is finished or being written; with --overwrite forget what was begun there."""
        from specexec.distill.training import CHECKPOINT

        hold(self.output)

        begun = self.output / CHECKPOINT
        if self.overwrite:
            begun.unlink(missing_ok=True)
        elif not begun.exists() and self.output.is_dir() and any(self.output.iterdir()):
            raise OutputFileExists(
                f"{self.output} is there already, and holds no training to continue.",
                hint="another -o, or --overwrite.",
            )

    def finish(self) -> None:
        """Delete what only continuing needs."""
        from specexec.distill.training import CHECKPOINT

        (self.output / CHECKPOINT).unlink(missing_ok=True)

    def computing(self) -> tuple[torch.device, bool]:
        """The device, and whether its products are quicker in bfloat16. Raises NoGpu where it is not there."""
        import torch

        from offload.machine.memory import free_vram_B

        if self.device == "auto":
            found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        else:
            found = torch.device(self.device)
        if found.type != "cpu":
            free_vram_B(str(found))
        return found, found.type != "cpu" or torch.cpu._is_amx_tile_supported()


def training_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add them; the command receives one `training: TrainingOptions`."""

    @functools.wraps(command)
    def collected(**arguments: object) -> Result:
        own = {name: arguments.pop(name) for name in TrainingOptions.__dataclass_fields__}
        return command(training=TrainingOptions(**own), **arguments)  # type: ignore[arg-type]  # click has checked them

    options = (
        click.argument("recorded", type=_FOLDER),
        click.option("-o", "--output", type=_FOLDER, required=True, help="The folder to write."),
        click.option("--epochs", type=WholeNumber(min=1), default=8, help="Times that every text is read."),
        click.option("--batch", type=WholeNumber(min=2), default=2048, help="Tokens of a step."),
        click.option("--length", type=WholeNumber(min=8), default=1024, help="Tokens after which a text is cut."),
        click.option("--rate", type=RealNumber(min=0, min_open=True), show_default="by the width",
                     help="AdamW's learning rate at its highest."),
        click.option("--loss", type=click.Choice(LOSSES), default="forward-kl", help="How far off it is, by what."),
        click.option("--seed", type=WholeNumber(min=0), default=0, help="Of first weights and the order of texts."),
        click.option("--device", type=Device(), metavar=Device.name, default="auto", help="Where to train."),
        click.option("--overwrite", is_flag=True, help="Begin again, and replace what is there."),
    )  # fmt: skip
    for option in reversed(options):
        collected = option(collected)
    return collected
