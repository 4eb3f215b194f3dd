"""What only a GPU can tell, in one command of at most ten minutes: a table and one JSON file to send. No network.

The cheapest checks come first; each runs in a process of its own, so that one that fails or hangs costs itself. The
file is written after every check: the same command goes on where it was stopped, and begins anew on another machine.
What there is no time for is said. The model of the sweeps has the shape of a 70B in four bits and nothing but zeros:
its files are holes that take no room on the disk, and its layers are as many as half of the free RAM holds.

    python scripts/gpu_check.py                      # the whole, on the GPU that is here
    python scripts/gpu_check.py --device cpu --tiny  # walked on a CPU, with stand-ins
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import torch
from inflation import SHAPES, Shape
from sparse_model import weights_of, write_sparse

import offload
import specexec
from offload.machine.accelerator import accelerator_of
from offload.machine.atomic_write import replacing
from offload.machine.identity import machine
from offload.machine.memory import free_ram
from offload.machine.speeds import Arithmetic
from offload.measure import probe_arithmetic, probe_link, probe_unpack
from offload.stream.store import Arena
from offload.stream.transfer import DeviceWire
from offload.units import GiB
from specexec import SamplingParams
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM

MiB = 1 << 20
ROOT = Path(__file__).parents[1]
TINY = Shape(hidden=256, layers=3, heads=4, kv_heads=2, head_dim=64, ff=512, tied=False)
LAYER_B = 485 * MiB
"""Of the large shape in four bits, scales included."""
TEXT = 64
TIERS: tuple[offload.Offload, ...] = ("none", "ram", "disk")

Record = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """Where to measure, how large, and what earlier checks found."""

    device: str
    tiny: bool
    found: Mapping[str, Record]

    @property
    def computes(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


def here(setting: Setting) -> Record:
    """What this machine is."""
    kind = setting.computes.type
    record: Record = {"python": platform.python_version(), "system": platform.release(), "ram_B": free_ram().free_B}
    record |= {name: version(name) for name in ("torch", "transformers", "specexec")}
    record |= machine("cpu" if kind == "cpu" else "cuda")
    if kind != "cpu":
        properties = torch.get_device_module(kind).get_device_properties(setting.device)
        record |= {"name": properties.name, "memory_B": properties.total_memory}
    if kind == "cuda":
        query = "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        record["link: generation, at most, lanes, at most, driver"] = _said(command)
    return record


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"


def link(setting: Setting) -> Record:
    """How fast pinned RAM is copied to the device."""
    if setting.computes.type == "cpu":
        return {"skipped": "RAM is the memory of a CPU"}
    return {"link_Bps": probe_link(setting.device)}


def copies(setting: Setting) -> Record:
    """How much of that our wire reaches with whole layers, two buffers by turns: the aim is 0.95."""
    accelerator = accelerator_of(setting.computes)
    if accelerator is None:
        return {"skipped": "RAM is the memory of a CPU"}
    arenas = [Arena(LAYER_B), Arena(LAYER_B)]
    wire = DeviceWire(accelerator, 2, LAYER_B, [], arenas)
    rates = []
    for number in range(10):
        began_s = time.perf_counter()
        for slot in range(2):
            wire.send(slot, arenas[slot].flat, [(0, LAYER_B)])
        for slot in range(2):
            wire.ready_to_fill(slot)
        if number:
            rates.append(2 * LAYER_B / (time.perf_counter() - began_s))
    wire.close()
    link_Bps = setting.found.get("link", {}).get("link_Bps")
    share = median(rates) / link_Bps if isinstance(link_Bps, float) else None
    return {"wire_Bps": median(rates), "share_of_link": share}


def arithmetic(setting: Setting) -> Record:
    """Products in 16 bits over few and many rows, and unpacking."""
    if setting.tiny:
        return {"skipped": "it has one size, which takes minutes on a CPU; specexec doctor measures it"}
    found = probe_arithmetic(setting.device, "bf16", 1.0)
    record: Record = {"flops": found.flops, "weights_Bps": found.weights_Bps, "curve": [list(at) for at in found.curve]}
    return record | {"unpack_Bps": probe_unpack(setting.device)}


def text(setting: Setting) -> Record:
    """The built-in pair writes the answers that are kept beside it, from every tier; tokens a second of it."""
    golden = json.loads((ROOT / "offload" / "demo" / "golden.json").read_text(encoding="utf-8"))
    golden = golden[: 1 if setting.tiny else 6]
    record: Record = {}
    for tier in TIERS[: 1 if setting.tiny else 3]:
        for drafter in ("none", "sibling"):
            with specexec.load("demo", drafter=drafter, offload=tier, device=setting.device, dtype="f32") as llm:
                began_s, tokens, right = time.perf_counter(), 0, 0
                for one in golden:
                    prompt = [{"role": "user", "content": one["prompt"]}]
                    answer = llm.generate(prompt, SamplingParams(max_tokens=20 if setting.tiny else 120))
                    right += one["answer"].startswith(answer.text)
                    tokens += len(answer.tokens)
            record[f"{tier}, {drafter}"] = {
                "right": right, "of": len(golden), "tokens_per_s": tokens / (time.perf_counter() - began_s)
            }  # fmt: skip
    return record


def tests(setting: Setting) -> Record:
    """The tests that need a GPU."""
    if setting.computes.type != "cuda":
        return {"skipped": "they need CUDA"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}


def sweeps(setting: Setting, cap_GiB: int) -> Record:
    """Seconds of a sweep from RAM under so much GPU memory, beside what bytes and arithmetic alone would take."""
    on_cpu = setting.computes.type == "cpu"
    if not on_cpu and torch.get_device_module(setting.device).mem_get_info(setting.computes)[1] < cap_GiB * GiB * 0.95:
        return {"skipped": f"the card has less than {cap_GiB} GiB"}
    large = SHAPES["70b"]
    layers = max(1, min(large.layers, free_ram().free_B // 2 // LAYER_B))
    shape = TINY if setting.tiny else replace(large, layers=layers)
    with TemporaryDirectory() as folder:
        write_sparse(Path(folder), shape, 256 if setting.tiny else 32_000)
        vram_B = None if on_cpu else cap_GiB * GiB - 512 * MiB  # what CUDA itself takes is not ours to plan
        model = offload.load(folder, "ram", setting.device, "bf16", vram_B=vram_B, ctx=2048, cache_moves=True)
    stream = offload.stream_of(model)
    lm, cache = TreeLM(model), KVCache()
    record: Record = {"layers": shape.layers, "bytes": stream.bytes_per_sweep, "placement": stream.placement.summary}
    try:
        lm.forward([Rows.text(cache, [1] * TEXT)])
        cache.commit(range(TEXT))
        for rows in (1, 16) if setting.tiny else (1, 64, 256, 1024):
            record[f"{rows} rows"] = _timed(lm, cache, rows, stream, _floor_s(setting, stream, shape, rows))
        if not on_cpu:
            planned_B = stream.placement.device_B
            peak_B = torch.accelerator.max_memory_reserved(setting.computes)
            record |= {"peak_B": peak_B, "planned_B": planned_B, "peak_over_plan": peak_B / max(planned_B or 0, 1)}
    finally:
        lm.close()
        stream.close()
    return record


def _timed(lm: TreeLM, cache: KVCache, rows: int, stream: offload.ModelStream, floor_s: float) -> Record:
    seconds, waited = [], []
    for _ in range(3):
        before_s, began_s = stream.stats().wait_s, time.perf_counter()
        (hidden,) = lm.forward([Rows(cache, [2] * rows, [-1] + [0] * (rows - 1))])
        hidden[-1, -1].item()
        seconds.append(time.perf_counter() - began_s)
        waited.append(stream.stats().wait_s - before_s)
        cache.forget_nodes()
    return {"s": min(seconds), "waited_s": min(waited), "floor_s": floor_s, "over_floor": min(seconds) / floor_s}


def _floor_s(setting: Setting, stream: offload.ModelStream, shape: Shape, rows: int) -> float:
    """What copies alone or products alone take; unpacking is ours to hide or to pay for."""
    link_Bps, known = setting.found.get("link", {}).get("link_Bps"), setting.found.get("arithmetic", {})
    copied_s = stream.bytes_per_sweep / link_Bps if isinstance(link_Bps, float) else 0.0
    flops, Bps, curve = known.get("flops"), known.get("weights_Bps"), known.get("curve")
    if not (isinstance(flops, float) and isinstance(Bps, float) and isinstance(curve, list)):
        return max(copied_s, 1e-9)
    products = Arithmetic(flops, Bps, tuple((int(at), float(each_s)) for at, each_s in curve))
    return max(copied_s, products.seconds(weights_of(shape), 2, rows), 1e-9)


CHECKS: dict[str, tuple[int, Callable[[Setting], Record]]] = {
    "machine": (30, here),
    "link": (30, link),
    "copies": (40, copies),
    "arithmetic": (40, arithmetic),
    "text": (120, text),
    "tests": (150, tests),
    "sweeps under 24 GB": (100, lambda setting: sweeps(setting, 24)),
    "sweeps under 8 GB": (100, lambda setting: sweeps(setting, 8)),
    "sweeps under 12 GB": (100, lambda setting: sweeps(setting, 12)),
    "sweeps under 16 GB": (100, lambda setting: sweeps(setting, 16)),
}
"""Each with the seconds that it may take at most."""


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, xpu or cpu.")
@click.option("--minutes", default=10.0, show_default=True, help="Stop after so long.")
@click.option("--out", type=click.Path(path_type=Path), default="gpu-check.json", show_default=True)
@click.option("--tiny", is_flag=True, help="Models of a few megabytes: shows that the checks run, measures nothing.")
@click.option("--only", type=click.Choice([*CHECKS]), help="One check, in this process: its record as JSON.")
def main(device: str, minutes: float, out: Path, tiny: bool, only: str | None) -> None:
    """Run the checks that are not in the file yet."""
    kept = _kept(out)
    if only:
        click.echo(json.dumps(CHECKS[only][1](Setting(device, tiny, kept))))
        return
    ends_s = time.monotonic() + 60 * minutes
    asked = [sys.executable, __file__, "--device", device, "--out", str(out), *(["--tiny"] if tiny else [])]
    for name, (most_s, _) in CHECKS.items():
        if name == "machine" or not _settled(kept.get(name)):
            left_s = ends_s - time.monotonic()
            record = run([*asked, "--only", name], min(most_s, left_s))
            if name == "machine" and _another(kept.get(name), record):
                kept = {}
            kept[name] = record
            with replacing(out) as file:
                file.write(json.dumps(kept, indent=1).encode())
        for line in _lines(name, kept[name]):
            click.echo(line)
    click.echo(f"{out}: this is the file to send.")


def run(command: list[str], most_s: float) -> Record:
    """One check in a process of its own."""
    if most_s < 1:
        return {"failed": "no time was left: the same command goes on from here"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=most_s, check=False, env=os.environ)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {most_s:.0f} s"}
    try:
        record: Record = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": done.stderr.strip()[-2000:] or f"ended with {done.returncode}"}
    return record


def _kept(out: Path) -> dict[str, Record]:
    try:
        kept: dict[str, Record] = json.loads(out.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise click.ClickException(f"{out} is no record of this check: {error}. Try: another --out.") from error
    return kept


def _settled(record: Record | None) -> bool:
    return record is not None and "failed" not in record


def _another(before: Record | None, now: Record) -> bool:
    """Is it another machine, or other software, than the file is of? Free memory alone changes all the time."""
    return before is not None and {**before, "ram_B": 0} != {**now, "ram_B": 0}


def _lines(name: str, record: Record) -> list[str]:
    return [f"{name:20} {key:28} {_words(value)}" for key, value in record.items()]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


if __name__ == "__main__":
    main()
