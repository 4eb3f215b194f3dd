"""A sweep of a disk-streamed model beside its two floors, its prediction and, if asked, how others run it from disk.

Floors and sweeps take turns in one run: a plain read of the same bytes in the best way that was found, the same sweep
with all layers resident (head and dequantisation included), both at once, and the streamed sweep. What counts is the
ratio within each round, sweep / max(disk floor, compute floor), its median and its range; quote ratios, not seconds.
Where disk and arithmetic slow each other down, both at once, with nothing between them, take longer than either. Direct
reads leave the page cache alone; the model's pages are dropped before each round, and a peer's before each of its
sweeps.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from peers import Accelerate, AirLLM, Peer
from timing import SPAN_B, TILE, drop_cache, knee, ratios, read_plainly, spread, timed
from transformers import PreTrainedModel

import offload
from cli.shared.options import SIZE
from offload.checkpoint.headers import Folder, open_folder
from offload.machine.files import Files
from offload.machine.speeds import Disk, Speeds, disk_key, load_speeds, save_speeds
from offload.measure import probe_arithmetic, probe_contention, probe_disk, probe_unpack
from offload.placement.forecast import Ceilings, ceilings, forecast
from offload.placement.quantized_sizes import is_quantised, work_of
from offload.stream.store import Arena
from offload.units import size
from specexec.model.linears.any_rows import linears


@dataclass
class Rounds:
    """Seconds of each kind, round by round."""

    disk: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    sweep: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)

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
@click.option(
    "--airllm", metavar="PYTHON", type=click.Path(exists=True, path_type=Path),
    help="Measure AirLLM too, in the Python where it is installed (dense models).",
)  # fmt: skip
@click.option(
    "--original", type=click.Path(exists=True, path_type=Path),
    help="What peers are given, where FOLDER is a pack of it: they rewrite it in ways of their own.",
)  # fmt: skip
@click.option("--peer-rounds", default=3, show_default=True, help="Rounds in which peers take their turn.")
def main(
    folder: Path, rows: tuple[int, ...], pairs: int, ram: int | None, threads: int, resident: bool, accelerate: bool,
    airllm: Path | None, original: Path | None, peer_rounds: int,
) -> None:  # fmt: skip
    """Measure sweeps of the model in FOLDER."""
    torch.set_num_threads(threads)
    checked = open_folder(folder)
    if (accelerate or airllm) and is_quantised(checked):
        raise click.UsageError("the peers take dense checkpoints; leave out --accelerate and --airllm")
    largest = max(checked.file_sizes, key=lambda file: checked.file_sizes[file])
    disk = probe_disk(largest)
    save_speeds(replace(load_speeds(), disks={**load_speeds().disks, disk_key(folder): disk}))
    model = offload.load(folder, "disk", ram_B=ram, ctx=2048)
    stream = offload.stream_of(model)
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[model.dtype]
    with linears(model.device, model.dtype, offload.share):
        arithmetic = probe_arithmetic("cpu", dtype)
        disk = probe_contention(largest, disk, dtype)
    unpack_Bps = {f"cpu/{scheme}": Bps for scheme, Bps in probe_unpack("cpu").items()} if is_quantised(checked) else {}
    limits = ceilings(
        Speeds({disk_key(folder): disk}, None, {f"cpu/{dtype}": arithmetic}, "", unpack_Bps),
        disk_key(folder),
        "cpu",
        dtype,
    )
    click.echo(stream.placement.summary)
    click.echo(f"probe      {disk.Bps / 1e9:.2f} GB/s with {disk.reading}; left beside each other: {disk.contention}")
    click.echo(f"arithmetic {arithmetic.flops / 1e9:.0f} GFLOP/s, {arithmetic.weights_Bps / 1e9:.1f} GB/s of weights")
    whole = offload.load(folder, "none", ctx=2048) if resident else None
    with ExitStack() as cleanup:
        cleanup.callback(stream.close)
        peers: list[Peer] = []
        if accelerate:
            peers.append(Accelerate(original or folder, model, Path(cleanup.enter_context(TemporaryDirectory()))))
        if airllm:
            scrap = Path(cleanup.enter_context(TemporaryDirectory(dir=folder.parent)))
            peers.append(AirLLM(airllm, original or folder, scrap))
        for peer in peers:
            cleanup.callback(peer.close)
        wide = knee(stream.placement, work_of(checked, "none", model.dtype.itemsize), limits)
        click.echo(f"knee       {wide} rows: arithmetic takes as long as the disk")
        # The engine never runs fewer than a tile; peers have their turn there, at the least arithmetic.
        for count in dict.fromkeys(max(count, TILE) for count in rows or (TILE, wide)):
            found = measure(model, whole, peers, checked, disk, count, pairs, peer_rounds)
            _tell(found, count, stream, checked, limits, model.dtype.itemsize)
            peers = []


def measure(
    model: PreTrainedModel,
    whole: PreTrainedModel | None,
    peers: list[Peer],
    checked: Folder,
    disk: Disk,
    rows: int,
    pairs: int,
    peer_rounds: int,
) -> Rounds:
    tokens = (torch.arange(rows) % 100)[None]
    stream, found = offload.stream_of(model), Rounds()
    plain = Files(checked.file_sizes, disk.reading)
    arena = Arena(SPAN_B)
    arena.flat.fill_(1)  # the first touch of memory is not the disk's

    def read() -> None:
        read_plainly(plain, arena, checked.file_sizes, stream.bytes_per_sweep)

    def both(whole: PreTrainedModel) -> None:
        reading = beside.submit(read)
        _sweep(whole, tokens)
        reading.result()

    with torch.no_grad(), ThreadPoolExecutor(1) as beside:
        for warm in (model, whole):  # opens files, touches buffers
            if warm is not None:
                _sweep(warm, tokens)
        for turn in range(pairs):
            _settle(stream)
            drop_cache(checked.file_sizes)
            found.disk.append(timed(read))
            if whole is not None:
                found.compute.append(timed(lambda: _sweep(whole, tokens)))
                found.both.append(timed(lambda: both(whole)))
            _sweep(model, tokens)  # the ring was full after the pause; what counts is the steady state
            before = stream.stats()
            found.sweep.append(timed(lambda: _sweep(model, tokens)))
            found.waited.append(stream.stats().wait_s - before.wait_s)
            for peer in peers if turn < peer_rounds else []:
                _settle(stream)
                found.peers.setdefault(peer.name, []).append(peer.sweep_s(tokens))
    plain.close()
    return found


def _sweep(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """As the engine does it; peers multiply in their own way."""
    with linears(model.device, model.dtype, offload.share):
        model(tokens)


def _tell(
    found: Rounds, rows: int, stream: offload.ModelStream, checked: Folder, limits: Ceilings, item_B: int
) -> None:
    predicted = forecast(stream.placement, work_of(checked, "none", item_B), limits, rows)
    click.echo(f"\n{rows} rows, {len(found.sweep)} rounds; median (lowest … highest)")
    click.echo(f"  disk floor          {spread(found.disk)} s for {size(stream.bytes_per_sweep)}")
    if found.compute:
        click.echo(f"  compute floor       {spread(found.compute)} s with every layer resident")
        click.echo(f"  both at once        {spread(found.both)} s")
    click.echo(f"  sweep               {spread(found.sweep)} s, of which {spread(found.waited)} s waited for weights")
    click.echo(f"  sweep / floor       {ratios(found.sweep, found.floor)}")
    if found.both:
        click.echo(f"  sweep / both        {ratios(found.sweep, found.both)}")
    click.echo(
        f"  sweep / prediction  {spread([sweep_s / predicted.sweep_s for sweep_s in found.sweep])}"
        f" ({predicted.bound}: {predicted.sweep_s:.2f} s)"
    )
    if found.compute:
        click.echo(f"  compute / predicted {spread([s / predicted.compute_s for s in found.compute])}")
    for name, seconds in found.peers.items():
        click.echo(f"  {name:<19} {spread(seconds)} s")
        click.echo(f"  {'':<8} over sweep  {ratios(seconds, found.sweep)}")


def _settle(stream: offload.ModelStream) -> None:
    """Wait until the ring is full and the disk is free."""
    before = -1.0
    while before != (before := stream.stats().read_s):
        time.sleep(0.3)


if __name__ == "__main__":
    main()
