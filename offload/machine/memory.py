"""How much memory this machine can give right now. Torch is asked only about a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from offload.errors import NoGpu
from offload.machine.speeds import ASSUMED_DISK_Bps, ASSUMED_LINK_Bps
from offload.machine.system import ulimits
from offload.units import GiB, size

CGROUP = Path("/sys/fs/cgroup")
# Files of cgroup v2 and v1: limit, use, and the name of the reclaimable page cache in memory.stat.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# What counts against a shell's `ulimit`, as /proc/self/status calls it.
COUNTED = {"-d": "VmData:", "-v": "VmSize:"}


@dataclass(frozen=True)
class Free:
    """What may be used. `vram_B` is None where the computation is on the CPU.

    The margins stay free where the choice is ours: budgets given by the user have none. Only a RAM budget that was
    given is filled by `--offload disk`. The speeds decide what is worth moving.
    """

    ram_B: int
    vram_B: int | None = None
    ram_limit: str = ""
    ram_margin_B: int = 0
    vram_margin_B: int = 0
    ram_given: bool = False
    disk_Bps: float = ASSUMED_DISK_Bps
    link_Bps: float = ASSUMED_LINK_Bps


@dataclass(frozen=True)
class Ram:
    """Free main memory and the limit that decides it, in words."""

    free_B: int
    limit: str


def free_ram(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> Ram:
    """The least of what the system has available and what our control groups and the shell's limits still allow."""
    system = Ram(psutil.virtual_memory().available, "")
    return min([system, *_in_containers(root, own), *_in_ulimits()], key=lambda ram: ram.free_B)


def _in_containers(root: Path, own: Path) -> Iterator[Ram]:
    for folder, names in _groups(root, own):
        limit_B, used_B = _number(folder / names[0]), _number(folder / names[1])
        # Unlimited groups of v1 hold a number close to 2^63.
        if limit_B is None or used_B is None or limit_B >= 1 << 60:
            continue
        # Pages of files that were read once are given back before anything is killed.
        free_B = max(0, limit_B - used_B + _stat(folder / "memory.stat", names[2]))
        yield Ram(free_B, f"container {size(limit_B)}")


def _in_ulimits() -> Iterator[Ram]:
    for option, limit_B in ulimits().items():
        used_B = _stat(Path("/proc/self/status"), COUNTED[option]) << 10
        yield Ram(max(0, limit_B - used_B), f"ulimit {option} {size(limit_B)}")


def free_vram_B(device: str) -> int:
    """What CUDA reports as free on the device."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu(
            f"--device {device} was asked for, but PyTorch {torch.__version__} finds no CUDA device.",
            "Either there is no NVIDIA GPU here, or this PyTorch was built without CUDA.",
            "--device cpu, or install the CUDA build: pip install torch",
        )
    free_B, _ = torch.cuda.mem_get_info(device)
    return int(free_B)


def free_memory(device: str, ram_B: int | None = None, vram_B: int | None = None) -> Free:
    """What may be used on this machine; budgets given by the user win over what is measured, and leave no margin."""
    ram = free_ram() if ram_B is None else Ram(ram_B, f"--ram {size(ram_B)}")
    free = Free(
        ram.free_B,
        ram_limit=ram.limit,
        ram_margin_B=0 if ram_B is not None else margin_B(ram.free_B),
        ram_given=ram_B is not None,
    )
    if device == "cpu":
        return free
    measured_B = free_vram_B(device)  # asked even where a budget is given: there may be no such device
    if vram_B is not None:
        return replace(free, vram_B=vram_B, vram_margin_B=0)
    return replace(free, vram_B=measured_B, vram_margin_B=margin_B(measured_B))


def margin_B(free_B: int) -> int:
    """What others may want a moment later: a sixteenth, within reason."""
    return min(max(free_B // 16, 256 << 20), 4 * GiB)


def _groups(root: Path, own: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """Our control groups and all above them, which limit us too."""
    found: list[tuple[Path, tuple[str, str, str]]] = [(root, V2), (root / "memory", V1)]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found  # not Linux, or no /proc
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top, names = (root, V2) if not controllers else (root / "memory", V1)
        if controllers and "memory" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [(top.joinpath(*parts[:depth]), names) for depth in range(1, len(parts) + 1)]
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None  # no such group here, or "max"


def _stat(file: Path, key: str) -> int:
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) for row in rows if row[0] == key), 0)
