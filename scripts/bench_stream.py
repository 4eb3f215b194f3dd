"""A sweep of a disk-streamed model beside its two floors, its prediction and, if asked, transformers' disk offload.

Floors and sweeps take turns in one run: a plain read of the same bytes in the best way that was found, the same sweep
with all layers resident (head and dequantisation included), and the streamed sweep. What counts is the ratio within
each round, sweep / max(disk floor, compute floor), its median and its range; quote ratios, not seconds. Direct reads
leave the page cache alone, and it is dropped before every sweep of a peer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from cli.options import SIZE
from offload.files import Files, Range
from offload.forecast import Ceilings, ceilings, forecast
from offload.formats import is_quantised, work_of
from offload.placement import size
from offload.probe import probe_arithmetic, probe_disk, probe_unpack
from offload.shards import Folder, open_folder
from offload.speeds import Disk, Speeds, disk_key, load_speeds, save_speeds
from offload.store import Arena

SPAN_B = 128 << 20
TILE = 16  # the engine never runs fewer rows


@dataclass
class Rounds:
    """Seconds of each kind, round by round."""

    disk: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    sweep: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    @property
    def floor(self) -> list[float]:
        """The higher of the two, in each round; the disk alone where nothing could be kept resident."""
        return list(map(max, zip(self.disk, self.compute, strict=True))) if self.compute else self.disk


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", type=int, multiple=True, help="Tokens of a sweep; may be repeated. [default: 16 and the knee]")
@click.option("--pairs", default=10, show_default=True, help="Rounds of floors and sweep for each number of rows.")
@click.option("--ram", type=SIZE, help="Keep layers in this budget.")
@click.option("--threads", default=1, show_default=True, help="Threads of the arithmetic.")
@click.option("--resident/--no-resident", default=True, show_default=True, help="Measure the compute floor too.")
@click.option("--accelerate", is_flag=True, help="Measure transformers with device_map to disk too (dense models).")
def main(
    folder: Path, rows: tuple[int, ...], pairs: int, ram: int | None, threads: int, resident: bool, accelerate: bool
) -> None:
    """Measure sweeps of the model in FOLDER."""
    torch.set_num_threads(threads)
    checked = open_folder(folder)
    if accelerate and is_quantised(checked):
        raise click.UsageError("accelerate's disk offload takes dense checkpoints; leave out --accelerate")
    disk = probe_disk(max(checked.file_sizes, key=lambda file: checked.file_sizes[file]))
    save_speeds(replace(load_speeds(), disks={**load_speeds().disks, disk_key(folder): disk}))
    model = offload.load(folder, "disk", ram_B=ram, ctx=2048)
    stream = offload.stream_of(model)
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[model.dtype]
    arithmetic = probe_arithmetic("cpu", dtype)
    unpack_Bps = {"cpu": probe_unpack("cpu")} if is_quantised(checked) else {}
    limits = ceilings(
        Speeds({disk_key(folder): disk}, None, {f"cpu/{dtype}": arithmetic}, "", unpack_Bps),
        disk_key(folder),
        "cpu",
        dtype,
    )
    click.echo(stream.placement.summary)
    click.echo(f"probe      {disk.Bps / 1e9:.2f} GB/s with {disk.reading}")
    click.echo(f"arithmetic {arithmetic.flops / 1e9:.0f} GFLOP/s, {arithmetic.weights_Bps / 1e9:.1f} GB/s of weights")
    whole = offload.load(folder, "none", ctx=2048) if resident else None
    with TemporaryDirectory() as scrap:
        peer = _accelerated(folder, model, Path(scrap)) if accelerate else None
        for count in rows or (TILE, _knee(checked, stream, limits, model.dtype.itemsize)):
            found = _measure(model, whole, peer, checked, disk, count, pairs)
            _tell(found, count, stream, checked, limits, model.dtype.itemsize)
    stream.close()


def _measure(
    model: PreTrainedModel,
    whole: PreTrainedModel | None,
    peer: PreTrainedModel | None,
    checked: Folder,
    disk: Disk,
    rows: int,
    pairs: int,
) -> Rounds:
    tokens = (torch.arange(max(rows, TILE)) % 100)[None]
    stream, found = offload.stream_of(model), Rounds()
    plain = Files(checked.file_sizes, disk.reading, SPAN_B)
    arena = Arena(SPAN_B)
    arena.flat.fill_(1)  # the first touch of memory is not the disk's
    with torch.no_grad():
        for warm in (model, whole):  # opens files, touches buffers
            if warm is not None:
                warm(tokens)
        for _ in range(pairs):
            _settle(stream)
            found.disk.append(_timed(lambda: _read(plain, arena, checked.file_sizes, stream.bytes_per_sweep)))
            if whole is not None:
                found.compute.append(_timed(lambda: whole(tokens)))
            model(tokens)  # the ring was full after the pause; what counts is the steady state
            before = stream.stats()
            found.sweep.append(_timed(lambda: model(tokens)))
            found.waited.append(stream.stats().wait_s - before.wait_s)
            if peer is not None:
                _settle(stream)
                _drop_cache(checked)
                found.peer.append(_timed(lambda: peer(tokens)))
    plain.close()
    return found


def _tell(
    found: Rounds, rows: int, stream: offload.ModelStream, checked: Folder, limits: Ceilings, item_B: int
) -> None:
    predicted = forecast(stream.placement, work_of(checked, "none", item_B), limits, max(rows, TILE))
    click.echo(f"\n{max(rows, TILE)} rows, {len(found.sweep)} rounds; median (lowest … highest)")
    click.echo(f"  disk floor          {_spread(found.disk)} s for {size(stream.bytes_per_sweep)}")
    if found.compute:
        click.echo(f"  compute floor       {_spread(found.compute)} s with every layer resident")
    click.echo(f"  sweep               {_spread(found.sweep)} s, of which {_spread(found.waited)} s waited for weights")
    click.echo(f"  sweep / floor       {_ratios(found.sweep, found.floor)}")
    click.echo(
        f"  sweep / prediction  {_spread([sweep_s / predicted.sweep_s for sweep_s in found.sweep])}"
        f" ({predicted.bound}: {predicted.sweep_s:.2f} s)"
    )
    if found.compute:
        click.echo(f"  compute / predicted {_spread([s / predicted.compute_s for s in found.compute])}")
    if found.peer:
        click.echo(f"  accelerate, to disk {_spread(found.peer)} s")
        click.echo(f"  accelerate / sweep  {_ratios(found.peer, found.sweep)}")


def _knee(checked: Folder, stream: offload.ModelStream, limits: Ceilings, item_B: int) -> int:
    """The rows, in whole tiles, at which arithmetic is predicted to take as long as the disk."""
    work = work_of(checked, "none", item_B)
    rows = TILE
    while forecast(stream.placement, work, limits, rows + TILE).bound == "disk" and rows < 1024:
        rows += TILE
    return rows


def _accelerated(folder: Path, model: PreTrainedModel, scrap: Path) -> PreTrainedModel:
    """The same checkpoint with the same parts in memory and every layer on disk."""
    layers = next(name for name, module in model.named_modules() if name.endswith("layers"))
    base = layers.rpartition(".")[0]
    places = {name: "cpu" for name, _ in model.named_children() if name != base}
    places |= {f"{base}.{name}": "cpu" for name, _ in model.get_submodule(base).named_children() if name != "layers"}
    places |= {f"{layers}.{index}": "disk" for index in range(offload.stream_of(model).layers)}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, device_map=places, offload_folder=scrap, local_files_only=True
    )
    return loaded


def _drop_cache(checked: Folder) -> None:
    for file in checked.file_sizes:
        with file.open("rb") as cached:
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _settle(stream: offload.ModelStream) -> None:
    """Wait until the ring is full and the disk is free."""
    before = -1.0
    while before != (before := stream.stats().read_s):
        time.sleep(0.3)


def _read(files: Files, arena: Arena, sizes_B: Mapping[Path, int], wanted_B: int) -> None:
    """So many bytes of the model's files with nothing else to do."""
    read_B = 0
    while read_B < wanted_B:
        for file, size_B in sizes_B.items():
            for offset in range(0, size_B, SPAN_B):
                length_B = min(SPAN_B, size_B - offset, wanted_B - read_B)
                if length_B:
                    files.read([Range(file, offset, (arena.bytes[:length_B],))], "floor")
                    read_B += length_B


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _ratios(above: list[float], below: list[float]) -> str:
    return _spread([one / other for one, other in zip(above, below, strict=True)])


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
