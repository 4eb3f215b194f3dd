"""Seconds of a sweep of a disk-streamed model beside a plain direct read of the same bytes and beside the prediction.

Floor, resident sweep and streamed sweep take turns in one run; the page cache is not used. Quote ratios, not seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import torch

import offload
from offload.files import Files, Range
from offload.forecast import ceilings, forecast
from offload.formats import work_of
from offload.placement import size
from offload.probe import probe_arithmetic, probe_disk
from offload.shards import open_folder
from offload.speeds import Speeds, disk_key, load_speeds, save_speeds
from offload.store import Arena

SPAN_B = 128 << 20


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=16, show_default=True, help="Tokens of a sweep; the engine never runs fewer than 16.")
@click.option("--pairs", default=10, show_default=True, help="Floor and sweep, one after the other, so often.")
@click.option("--ram", type=int, help="Keep layers in this budget of bytes.")
@click.option("--threads", default=1, show_default=True, help="Threads of the arithmetic.")
def main(folder: Path, rows: int, pairs: int, ram: int | None, threads: int) -> None:
    """Measure sweeps of the model in FOLDER."""
    torch.set_num_threads(threads)
    checked = open_folder(folder)
    largest = max(checked.file_sizes, key=lambda file: checked.file_sizes[file])
    disk = probe_disk(largest)
    save_speeds(replace(load_speeds(), disks={**load_speeds().disks, disk_key(folder): disk}))
    model = offload.load(folder, "disk", ram_B=ram, ctx=max(512, rows))
    stream = offload.stream_of(model)
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[model.dtype]
    arithmetic = probe_arithmetic("cpu", dtype)
    speeds = Speeds({disk_key(folder): disk}, None, {f"cpu/{dtype}": arithmetic})
    predicted = forecast(
        stream.placement,
        work_of(checked, "none", model.dtype.itemsize),
        ceilings(speeds, disk_key(folder), "cpu", dtype),
        max(rows, 16),
    )
    tokens = (torch.arange(rows) % 100)[None]
    floors, sweeps, waits = [], [], []
    plain = Files(checked.file_sizes, disk.reading, SPAN_B)
    with torch.no_grad():
        model(tokens)  # opens files, touches buffers
        for _ in range(pairs):
            _settle(stream)
            floors.append(_floor_s(plain, checked.file_sizes, stream.bytes_per_sweep))
            model(tokens)  # the ring was full after the pause; what counts is the steady state
            before, started_s = stream.stats(), time.perf_counter()
            model(tokens)
            sweeps.append(time.perf_counter() - started_s)
            waits.append(stream.stats().wait_s - before.wait_s)
    ratios = [sweep_s / floor_s for sweep_s, floor_s in zip(sweeps, floors, strict=True)]
    click.echo(f"{stream.placement.summary}")
    click.echo(f"probe      {disk.Bps / 1e9:.2f} GB/s with {disk.reading}")
    click.echo(f"arithmetic {arithmetic.flops / 1e9:.0f} GFLOP/s, {arithmetic.weights_Bps / 1e9:.1f} GB/s of weights")
    click.echo(
        f"floor      {_spread(floors)} s for {size(stream.bytes_per_sweep)}, read plainly in the probe's best way"
    )
    click.echo(f"sweep      {_spread(sweeps)} s, of which {_spread(waits)} s waited for weights")
    click.echo(f"sweep / floor       {_spread(ratios)}")
    click.echo(f"sweep / prediction  {_spread([sweep_s / predicted.sweep_s for sweep_s in sweeps])}"
               f" ({predicted.bound}: {predicted.sweep_s:.2f} s)")  # fmt: skip
    stream.close()


def _settle(stream: offload.ModelStream) -> None:
    """Wait until the ring is full and the disk is free."""
    before = -1.0
    while before != (before := stream.stats().read_s):
        time.sleep(0.3)


def _floor_s(files: Files, sizes_B: Mapping[Path, int], wanted_B: int) -> float:
    """Seconds of reading so many bytes in the best way that was found, with nothing else to do."""
    arena, read_B = Arena(SPAN_B), 0
    started_s = time.perf_counter()
    while read_B < wanted_B:
        for file, size_B in sizes_B.items():
            for offset in range(0, size_B, SPAN_B):
                length_B = min(SPAN_B, size_B - offset, wanted_B - read_B)
                if length_B:
                    files.read([Range(file, offset, (arena.bytes[:length_B],))], "floor")
                    read_B += length_B
    return time.perf_counter() - started_s


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
