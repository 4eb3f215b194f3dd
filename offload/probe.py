"""How fast disk, link and arithmetic are here, measured in about two seconds each. Torch only where it must compute.

Disks are read through the very code that streams weights, so that what wins here wins there.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from offload.files import PAGE_B, Files, Range, Reading
from offload.speeds import Arithmetic, Disk
from offload.store import Arena

MiB = 1 << 20
SAMPLE_B = 512 * MiB
SPAN_B = 64 * MiB
READINGS = tuple(
    Reading(block_B * MiB, threads, direct) for direct in (True, False) for block_B in (1, 4, 16) for threads in (1, 4)
)
# Plain reads go through the page cache and push out what others keep there: they have to be worth it.
WORTH = 1.15


@dataclass(frozen=True)
class Trial:
    """One way of reading, and the bytes per second it gave."""

    reading: Reading
    Bps: float


def probe_disk(file: Path, seconds: float = 2.0) -> Disk:
    """The best way to read files like this one; the leaders of a short round run a second one."""
    trials = [Trial(reading, _read_Bps(file, reading, seconds / 2 / len(READINGS))) for reading in READINGS]
    leaders = sorted(trials, key=lambda trial: -trial.Bps)[:4]
    leaders += [max((trial for trial in trials if trial.reading.direct), key=lambda trial: trial.Bps)]
    again = [Trial(trial.reading, _read_Bps(file, trial.reading, seconds / 10)) for trial in leaders]
    return choose(again)


def choose(trials: list[Trial]) -> Disk:
    """The fastest, direct unless plain reads are clearly faster."""
    best = max(trials, key=lambda trial: trial.Bps * (WORTH if trial.reading.direct else 1))
    return Disk(best.Bps, best.reading)


def write_sample(folder: Path) -> Path:
    """A file of noise to read, where there is no large one; the caller removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".specexec-probe-{os.getpid()}"
    noise = os.urandom(16 * MiB)  # what cannot be compressed, on any disk
    with file.open("wb") as out:
        for _ in range(SAMPLE_B // len(noise)):
            out.write(noise)
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def probe_arithmetic(device: str, dtype: str, seconds: float = 2.0) -> Arithmetic:
    """Multiplying by weights that are in no cache: bytes of weights for 16 rows, operations for 512."""
    import torch

    kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    side = 4096
    weights = [torch.randn(side, side, device=device).to(kind) for _ in range(4 if device == "cpu" else 16)]

    def multiply(rows: int) -> Callable[[], None]:
        inputs = torch.randn(rows, side, device=device).to(kind)

        def once() -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs, weight)
            if device != "cpu":
                torch.cuda.synchronize()

        return once

    few_s, many_s = _best_s(multiply(16), seconds / 2), _best_s(multiply(512), seconds / 2)
    count = len(weights) * side * side
    return Arithmetic(2 * count * 512 / many_s, count * kind.itemsize / few_s)


def probe_unpack(device: str, seconds: float = 1.0) -> float:
    """Bytes of 16-bit weights a second that come out of 4 bits, by the code that every layer goes through."""
    import torch

    from offload.quant import dequantise, quantise
    from offload.quantised import Quantised
    from offload.shards import Entry

    side = 2048
    name = "probe"
    parts = quantise(torch.randn(side, side).to(torch.bfloat16), name, "nf4")
    state = json.loads(bytes(parts[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    roles = {"codes": name} | {role: f"{name}.{role}" for role in ("absmax", "nested_absmax", "nested_quant_map")}
    weight = Quantised(
        name, "nf4", (side, side), {role: Entry(key, Path(), 0, 0, "U8", ()) for role, key in roles.items()}, "BF16",
        offsets=(float(state["nested_offset"]),),
    )  # fmt: skip
    members = {role: parts[key].to(device) for role, key in roles.items()}
    target = torch.empty(side, side, dtype=torch.bfloat16, device=device)

    def once() -> None:
        dequantise(weight, members, target)
        if device != "cpu":
            torch.cuda.synchronize()

    return target.nbytes / _best_s(once, seconds)


def probe_link(device: str, seconds: float = 2.0) -> float:
    """Bytes per second of copies from pinned memory to the device."""
    import torch

    source = torch.empty(256 * MiB, dtype=torch.uint8).pin_memory()
    target = torch.empty(256 * MiB, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return source.nbytes / _best_s(copy, seconds)


def _read_Bps(file: Path, reading: Reading, seconds: float) -> float:
    size_B = file.stat().st_size
    span_B = min(SPAN_B, size_B // PAGE_B * PAGE_B)
    arena = Arena(span_B)
    files = Files({file: size_B}, reading, span_B)
    offset = read_B = 0
    # Opening, threads and the first touch of memory happen once per model, not once per sweep.
    files.read([Range(file, 0, (arena.bytes,))], "probe")
    with file.open("rb") as cached:
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what memory holds is not the disk's speed
    started_s = time.perf_counter()
    while (spent_s := time.perf_counter() - started_s) < seconds or not read_B:
        offset = offset + span_B if offset + 2 * span_B <= size_B else 0
        files.read([Range(file, offset, (arena.bytes,))], "probe")
        read_B += span_B
        spent_s = time.perf_counter() - started_s
    files.close()
    return read_B / spent_s


def _best_s(work: Callable[[], None], seconds: float) -> float:
    """The median after a warm-up: neighbours on the machine are part of it."""
    work()
    times: list[float] = []
    started_s = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started_s < seconds:
        at_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - at_s)
    return median(times)
