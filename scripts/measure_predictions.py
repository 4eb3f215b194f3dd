"""What `specexec plan` predicts beside what a sweep takes, for every number format, every tier, few rows and the knee.

Speeds are probed before and after every few sweeps and their mean predicts those between, so that a machine that is
busy slows both alike. The formats' packs are made once, beside the model, and are used again. Quote ratios.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import click
import torch
from timing import SPAN_B, TILE, drop_cache, knee, read_plainly, spread, timed
from transformers import PreTrainedModel

import offload
from offload.checkpoint.headers import Folder, open_folder
from offload.checkpoint.skeleton import DTYPES
from offload.hub.headers_only import NAMES, item_B
from offload.machine.files import Files
from offload.machine.memory import free_memory
from offload.machine.speeds import Arithmetic, Disk, Speeds, disk_key, load_speeds, save_speeds
from offload.measure import probe_arithmetic, probe_contention, probe_disk, probe_unpack
from offload.packs.pack import pack, plan
from offload.placement.forecast import Ceilings, Work, ceilings, forecast
from offload.placement.placement import Placement
from offload.placement.quantized_sizes import FORMATS, Format, need_in, work_of
from offload.placement.solver import place
from offload.stream.store import Arena
from specexec.model.linears.any_rows import linears

CTX = 2048
PROBE_s = 0.6
MODES: tuple[offload.Offload, ...] = ("none", "ram", "disk")


@dataclass
class Probe:
    """The speeds of this moment, for the ways in which this model is read."""

    folder: Folder
    disk: Disk
    dtype: str

    def __post_init__(self) -> None:
        self._files = Files(self.folder.file_sizes, self.disk.reading)
        self._arena = Arena(SPAN_B)
        self._arena.flat.fill_(1)

    def speeds(self) -> Speeds:
        """Disk, arithmetic and unpacking."""
        drop_cache(self.folder.file_sizes)
        wanted_B = int(self.disk.Bps * PROBE_s)
        read_s = timed(lambda: read_plainly(self._files, self._arena, self.folder.file_sizes, wanted_B))
        with linears(torch.device("cpu"), DTYPES[self.dtype], offload.share):
            arithmetic = probe_arithmetic("cpu", self.dtype, PROBE_s)
        return Speeds(
            {"here": replace(self.disk, Bps=wanted_B / read_s)},
            None,
            {f"cpu/{self.dtype}": arithmetic},
            "",
            {f"cpu/{scheme}": Bps for scheme, Bps in probe_unpack("cpu", PROBE_s).items()},
        )


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", type=int, multiple=True, help="Tokens of a sweep; may be repeated. [default: 16 and the knee]")
@click.option("--sweeps", default=3, show_default=True, help="Sweeps between two probes.")
@click.option("--turns", default=2, show_default=True, help="Probes and sweeps of each combination.")
@click.option("--threads", default=1, show_default=True, help="Threads of the arithmetic.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each combination.")
def main(folder: Path, rows: tuple[int, ...], sweeps: int, turns: int, threads: int, as_json: bool) -> None:
    """Set predictions beside sweeps of the dense model in FOLDER."""
    torch.set_num_threads(threads)
    checked = open_folder(folder)
    packs = {form: _packed(checked, form) for form in FORMATS}
    largest, dtype = max(checked.file_sizes, key=lambda file: checked.file_sizes[file]), NAMES[item_B(checked)]
    disk = probe_disk(largest)
    with linears(torch.device("cpu"), DTYPES[dtype], offload.share):
        disk = probe_contention(largest, disk, dtype)
    save_speeds(replace(load_speeds(), disks={**load_speeds().disks, disk_key(folder): disk}))
    probe = Probe(checked, disk, dtype)
    if not as_json:
        click.echo("format  tier  rows  bound    predicted s  measured s           measured / predicted")
    for form in FORMATS:
        need, work = need_in(checked, form, item_B(checked), CTX), work_of(checked, form, item_B(checked))
        for mode in MODES:
            placement = place(need, free_memory("cpu"), mode)
            model = offload.load(packs[form], mode, ctx=CTX)
            limits = _limits(probe.speeds(), probe.dtype)
            wide = knee(placement, work, limits) if mode == "disk" else 4 * TILE
            for count in dict.fromkeys(max(count, TILE) for count in rows or (TILE, wide)):
                forecasts, took = _compare(model, probe, placement, work, count, sweeps, turns)
                _report(form, mode, count, forecasts, took, as_json)
            offload.stream_of(model).close()


def _packed(checked: Folder, form: Format) -> Path:
    if form == "none":
        return checked.path
    out = checked.path.with_name(f"{checked.path.name}-{form}")
    if not (out / "config.json").is_file():
        click.echo(f"packing {out} …", err=True)
        pack(plan(checked, form), out)
    return out


def _compare(
    model: PreTrainedModel, probe: Probe, placement: Placement, work: Work, rows: int, sweeps: int, turns: int
) -> tuple[list[tuple[str, float]], list[float]]:
    """Bound and predicted seconds, and measured ones, turn by turn."""
    tokens = (torch.arange(rows) % 100)[None]
    probes, took = [probe.speeds()], []
    with torch.no_grad(), linears(model.device, model.dtype, offload.share):
        for _ in range(turns):
            model(tokens)  # the ring was full after the pause; what counts is the steady state
            took.append(median(timed(lambda: model(tokens)) for _ in range(sweeps)))
            probes.append(probe.speeds())
    forecasts = []
    for before, after in pairwise(probes):
        found = forecast(placement, work, _limits(_between(before, after), probe.dtype), rows)
        forecasts.append((found.bound, found.sweep_s))
    return forecasts, took


def _between(before: Speeds, after: Speeds) -> Speeds:
    """The speeds at which work takes the mean of the seconds that it takes at both."""

    def mean(one: float, other: float) -> float:
        return 2 / (1 / one + 1 / other)

    arithmetic = {}
    for key, one in before.arithmetic.items():
        other = after.arithmetic[key]
        curve = tuple((rows, (s + t) / 2) for (rows, s), (_, t) in zip(one.curve, other.curve, strict=True))
        arithmetic[key] = Arithmetic(mean(one.flops, other.flops), mean(one.weights_Bps, other.weights_Bps), curve)
    disks = {key: replace(one, Bps=mean(one.Bps, after.disks[key].Bps)) for key, one in before.disks.items()}
    unpack_Bps = {key: mean(Bps, after.unpack_Bps[key]) for key, Bps in before.unpack_Bps.items()}
    return Speeds(disks, None, arithmetic, "", unpack_Bps)


def _limits(speeds: Speeds, dtype: str) -> Ceilings:
    return ceilings(speeds, "here", "cpu", dtype)


def _report(
    form: Format, mode: str, rows: int, forecasts: list[tuple[str, float]], took: list[float], as_json: bool
) -> None:
    predicted = [seconds for _, seconds in forecasts]
    found = [measured / seconds for measured, seconds in zip(took, predicted, strict=True)]
    if as_json:
        record = {"format": form, "offload": mode, "rows": rows, "bound": [bound for bound, _ in forecasts]}
        click.echo(json.dumps(record | {"predicted_s": predicted, "measured_s": took, "ratio": found}))
        return
    bound = "/".join(dict.fromkeys(bound for bound, _ in forecasts))
    click.echo(
        f"{form:<6}  {mode:<4}  {rows:>4}  {bound:<7}  {median(predicted):>11.2f}  {spread(took):<19}  {spread(found)}"
    )


if __name__ == "__main__":
    main()
