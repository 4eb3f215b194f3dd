"""`specexec doctor`: is this machine fit, how fast are its disk, link and arithmetic, and what would help."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.models.gpu_cards import link_of
from cli.shared.conditions import conditions
from cli.shared.control_codes import echo
from cli.shared.quantities import format_bytes
from cli.shared.verbosity import json_option, verbosity_options

if TYPE_CHECKING:
    from offload.machine.gpus import Gpu
    from offload.machine.speeds import Disk

BROKEN = 6
MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}
LARGE_B = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


@click.command(short_help="Check this machine and measure its speeds.")
@click.option("--quick", is_flag=True, help="Look only; measure nothing.")
@click.option("--path", type=click.Path(exists=True, path_type=Path), show_default="the Hub's cache",
              help="Measure the disk that this file or folder is on.")  # fmt: skip
@json_option()
@verbosity_options
def doctor(quick: bool, path: Path | None, as_json: bool) -> int:
    """Check what this machine has, and measure disk, link and arithmetic for about two seconds each.

    What was measured is kept: `specexec plan` predicts with it, and the disk is read the way that was fastest.
    """
    checks: list[Check] = []
    for check in (*_looked_at(), *(_kept() if quick else _measured(path))):
        checks.append(check)
        if not as_json:
            echo(f"{MARKS[check.status]} {check.name:<12} {check.found}", folded=True)
            if check.fix:
                echo(f"  {'':<12} {check.fix}", folded=True)
    if as_json:
        echo(json.dumps({"checks": [asdict(check) for check in checks]}, indent=1))
    return BROKEN if any(check.status == "fail" for check in checks) else 0


def _looked_at() -> Iterator[Check]:

    from offload.machine.gpus import gpus
    from offload.machine.memory import free_ram
    from offload.units import GiB, size

    wsl = "microsoft" in platform.release().lower()
    yield Check(
        "system",
        "ok",
        f"{platform.system()} {platform.release()}{' (WSL)' if wsl else ''}, Python {platform.python_version()}",
    )
    ram = free_ram()
    few = ram.free_B < 4 * GiB
    raise_it = "raise memory= in %UserProfile%\\.wslconfig." if wsl else "close other programs, or raise the limit."
    yield Check(
        "RAM",
        "warn" if few else "ok",
        f"{size(ram.free_B)} free{f' (limit: {ram.limit})' if ram.limit else ''}",
        f"Large models will stream from disk: {raise_it}" if few else None,
    )
    found = gpus()
    for gpu in found:
        yield _gpu(gpu)
    if not found:
        fix = "If there is a GPU of NVIDIA or AMD, install its driver."
        yield Check("GPU", "warn", "none found: everything computes on the CPU", fix)
    cache = _existing(_cache())
    free_B = shutil.disk_usage(cache).free
    yield Check(
        "disk space",
        "warn" if free_B < 20 * GiB else "ok",
        f"{size(free_B)} free at {cache}",
        "HF_HOME on a larger disk: a 70B model in 4 bits takes 40 GB." if free_B < 20 * GiB else None,
    )
    lacking = [name for name in ("torch", "transformers", "accelerate", "safetensors") if find_spec(name) is None]
    yield Check(
        "packages",
        "fail" if lacking else "ok",
        f"missing: {', '.join(lacking)}" if lacking else "torch, transformers, accelerate and safetensors are here",
        f"pip install {' '.join(lacking)}" if lacking else None,
    )
    if find_spec("bitsandbytes") is None:
        yield Check("4 bits", "warn", "bitsandbytes is missing", "pip install bitsandbytes, to stream 4-bit weights.")


def _gpu(gpu: Gpu) -> Check:
    """One that is here: whether its slot gives it the link that it was made for."""
    from offload.units import size

    made_for, words = link_of(gpu.name), f"{gpu.name}, {size(gpu.free_B)} of {size(gpu.total_B)} free"
    if gpu.link is None:
        return Check("GPU", "ok", words)
    words += f", {gpu.link} ({format_bytes(gpu.link.Bps)}/s expected)"
    if made_for is None or gpu.link.Bps >= made_for.Bps:
        return Check("GPU", "ok", words)
    fix = f"The card was made for {made_for}: another slot of the board may have more lanes or a newer generation."
    return Check("GPU", "warn", words, fix)


def _kept() -> Iterator[Check]:
    """What an earlier run measured, and whether it still holds."""
    from offload.machine.gpus import gpus
    from offload.machine.speeds import load_speeds

    speeds, device = load_speeds(), "cuda" if gpus() else "cpu"
    changed = speeds.changed(device, conditions(device))
    if not speeds.measured:
        yield Check("speeds", "warn", "not measured yet", "specexec doctor, without --quick.")
    elif changed:
        fix = "specexec doctor, without --quick, measures again; until then `plan` assumes."
        yield Check("speeds", "warn", f"arithmetic was measured with {'; '.join(changed)}", fix)
    else:
        yield Check("speeds", "ok", f"measured {speeds.measured}")


def _measured(path: Path | None) -> Iterator[Check]:

    from offload.errors import OffloadError
    from offload.machine.speeds import ALONE, Speeds, disk_key, load_speeds, save_speeds

    before = load_speeds()
    disks, arithmetic, link_Bps = dict(before.disks), dict(before.arithmetic), before.link_Bps
    where = path or _existing(_cache())
    try:
        found = _probe_disk(where)
        disks[disk_key(where)] = found
        way = found.reading
        how = f"{way.block_B >> 20} MiB × {way.threads}, {'direct' if way.direct else 'buffered'}"
        slow, left = found.Bps < 1e9, found.contention
        beside = f"; at once with arithmetic {left.disk:.0%} of that, and {left.compute:.0%} of the arithmetic"
        yield Check(
            "disk",
            "warn" if slow else "ok",
            f"{format_bytes(found.Bps)}/s ({how}) at {where}{beside if left != ALONE else ''}",
            "A sweep of a 70B model in 4 bits reads 38 GB: an NVMe disk gives 3 to 7 GB/s." if slow else None,
        )
    except (OffloadError, OSError) as error:
        yield Check("disk", "warn", f"could not be measured: {error}", "--path on another disk.")
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        from offload.measure import probe_link

        link_Bps = probe_link("cuda")
        narrow = link_Bps < 8e9
        fix = "The GPU may sit in a slot with few lanes, or save power: check it under load." if narrow else None
        yield Check("link", "warn" if narrow else "ok", f"{format_bytes(link_Bps)}/s from pinned RAM to the GPU", fix)
    from offload.checkpoint.skeleton import DTYPES
    from offload.machine import integer_products
    from offload.machine.thread_pool import share
    from offload.measure import probe_arithmetic, probe_unpack
    from specexec.model.linears.any_rows import linears

    device = "cuda" if cuda else "cpu"
    for dtype in ("f32", "bf16"):
        with linears(torch.device(device), DTYPES[dtype], share):
            arithmetic[f"{device}/{dtype}"] = one = probe_arithmetic(device, dtype, 1.0)
        slow = one.flops < arithmetic[f"{device}/f32"].flops / 2
        yield Check(
            f"{device} {dtype}",
            "warn" if slow else "ok",
            f"{one.flops / 1e9:,.0f} GFLOP/s over 512 rows; {format_bytes(one.weights_Bps)}/s of weights over 16",
            "16 bits are slow here: --dtype f32 computes faster, and takes twice the memory." if slow else None,
        )
    arithmetic[f"{device}/int8"] = one = probe_arithmetic(device, "int8", 1.0)
    yield Check(
        f"{device} int8",
        "ok",
        f"{one.flops / 1e9:,.0f} GFLOP/s over 512 rows; {format_bytes(one.weights_Bps)}/s of weights over 16, "
        f"{integer_products.way(device)} (--compute int8)",
    )
    unpacked_Bps = {f"{device}/{scheme}": Bps for scheme, Bps in probe_unpack(device).items()}
    each = ", ".join(f"{key.partition('/')[2]} {format_bytes(Bps)}/s" for key, Bps in unpacked_Bps.items())
    yield Check(f"{device} unpacks", "ok", f"{each} of 16-bit weights")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    made_with = {**before.conditions, device: conditions(device)}
    file = save_speeds(Speeds(disks, link_Bps, arithmetic, now, {**before.unpack_Bps, **unpacked_Bps}, made_with))
    yield Check("kept", "ok", f"{file}")


def _probe_disk(where: Path) -> Disk:
    """The largest weight file there, or a file of noise that is removed again."""
    from offload.measure import write_sample

    large = max(_weights(where), key=lambda file: file.stat().st_size, default=None)
    if large is not None and large.stat().st_size >= LARGE_B:
        return _probed(large)
    sample = write_sample(where if where.is_dir() else where.parent)
    try:
        return _probed(sample)
    finally:
        sample.unlink()


def _probed(file: Path) -> Disk:
    """The disk by itself and, where a CPU computes, beside it."""
    import torch

    from offload.machine.thread_pool import share
    from offload.measure import probe_contention, probe_disk
    from specexec.model.linears.any_rows import linears

    found = probe_disk(file)
    if torch.cuda.is_available():
        return found
    with linears(torch.device("cpu"), torch.bfloat16, share):
        return probe_contention(file, found, "bf16")


def _weights(where: Path) -> list[Path]:
    return [where] if where.is_file() else [file for file in where.rglob("*.safetensors") if file.is_file()]


def _cache() -> Path:
    """Where models are downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
