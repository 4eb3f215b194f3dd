"""How fast this machine's disks, link and arithmetic are: what `doctor` measured, kept in one file. Knows no torch.

Every number is an upper bound that was measured here, or is missing. Nothing here changes what a model computes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil

from offload.machine.atomic_write import replacing
from offload.machine.files import SAFE, Reading
from offload.machine.folders import folder_of

log = logging.getLogger(__name__)

# Assumed where nothing was measured: a PCIe 4 SSD and link. They are labelled as such.
ASSUMED_DISK_Bps = 3.0e9
ASSUMED_LINK_Bps = 24e9
# The conditions that decide how fast a link is, by their names in `offload.machine.identity`.
LINKED = {"processor", "GPU"}


@dataclass(frozen=True)
class Contention:
    """What is left of the speed of each where a CPU computes while it reads: both want its cores and its memory."""

    compute: float = 1.0
    disk: float = 1.0


ALONE = Contention()


@dataclass(frozen=True)
class Disk:
    """The fastest way found to read large files from a disk, and its speed."""

    Bps: float
    reading: Reading
    contention: Contention = ALONE


@dataclass(frozen=True)
class Arithmetic:
    """Multiplying by weights on a device: of many rows, in operations, and of few, in bytes of weights read.

    `curve`: where it was measured, rows and the seconds that each weight takes for them, from few rows to many.
    """

    flops: float
    weights_Bps: float
    curve: tuple[tuple[int, float], ...] = ()

    def seconds(self, weights: float, item_B: int, rows: float) -> float:
        """For so many rows and weights: on lines between what was measured, else what the slower of the two takes."""
        if len(self.curve) < 2:
            return max(weights * item_B / self.weights_Bps, 2 * weights * rows / self.flops)
        each_s = self.curve[0][1]  # fewer rows are padded
        for (few, few_s), (many, many_s) in pairwise(self.curve):
            if rows > few:
                each_s = few_s + (many_s - few_s) * (rows - few) / (many - few)
            if rows <= many:
                break
        return weights * each_s


@dataclass(frozen=True)
class Speeds:
    """What was measured: disks by `disk_key`, the link to the GPU, arithmetic by `device/dtype`.

    `unpack_Bps`: 16-bit weights that come out of few bits in a second, by `device/scheme`. `conditions`, by device:
    what arithmetic, unpacking and the link were measured with, such as torch and its version.
    """

    disks: Mapping[str, Disk] = field(default_factory=dict)
    link_Bps: float | None = None
    arithmetic: Mapping[str, Arithmetic] = field(default_factory=dict)
    measured: str = ""
    unpack_Bps: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def changed(self, device: str, now: Mapping[str, str]) -> tuple[str, ...]:
        """Which conditions are others now than when this device was measured, in words; none if it never was."""
        then = self.conditions.get(device, {})
        return tuple(f"{name} {then.get(name, 'unknown')}, now {now[name]}" for name in self._others(device, now))

    def valid_under(self, device: str, now: Mapping[str, str]) -> Speeds:
        """Without what was measured under other conditions than `now`: arithmetic, and its contention with the disk.

        The link to a GPU counts as measured as long as the machine is the same.
        """
        others = self._others(device, now)
        if not others:
            return self
        arithmetic = {key: one for key, one in self.arithmetic.items() if not key.startswith(f"{device}/")}
        unpack_Bps = {key: Bps for key, Bps in self.unpack_Bps.items() if not key.startswith(f"{device}/")}
        kept = replace(self, arithmetic=arithmetic, unpack_Bps=unpack_Bps)
        if device == "cpu":
            return replace(kept, disks={key: replace(disk, contention=ALONE) for key, disk in self.disks.items()})
        return replace(kept, link_Bps=None) if LINKED.intersection(others) else kept

    def _others(self, device: str, now: Mapping[str, str]) -> list[str]:
        measured = {key.partition("/")[0] for key in (*self.arithmetic, *self.unpack_Bps)}
        if self.link_Bps:
            measured.add("cuda")
        then = self.conditions.get(device, {})
        return [name for name, value in now.items() if device in measured and then.get(name) != value]


def speeds_file() -> Path:
    """Where `doctor` keeps what it measured."""
    return folder_of("cache") / "speeds.json"


def load_speeds(file: Path | None = None) -> Speeds:
    """What was measured here before; nothing if nothing was."""
    path = file or speeds_file()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Speeds(
            {
                key: Disk(
                    float(row["Bps"]),
                    Reading(**{name: row["reading"][name] for name in asdict(SAFE)}),
                    Contention(**{name: float(left) for name, left in row.get("contention", {}).items()}),
                )
                for key, row in found["disks"].items()
            },
            found["link_Bps"],
            {
                key: Arithmetic(
                    float(row["flops"]),
                    float(row["weights_Bps"]),
                    tuple((int(rows), float(seconds)) for rows, seconds in row.get("curve", ())),
                )
                for key, row in found["arithmetic"].items()
            },
            str(found["measured"]),
            {key: float(value) for key, value in found.get("unpack_Bps", {}).items()},
            {
                device: {name: str(value) for name, value in one.items()}
                for device, one in found.get("conditions", {}).items()
            },
        )
    except FileNotFoundError:
        return Speeds()
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be used (%s): run `specexec doctor` to measure again", path, error)
        return Speeds()


def save_speeds(speeds: Speeds, file: Path | None = None) -> Path:
    """Keep what was measured; a reader sees the old file or the new one."""
    path = file or speeds_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as kept:
        kept.write(json.dumps(asdict(speeds), indent=1).encode())
    return path


def disk_key(path: Path, blocks: Path = Path("/sys/dev/block")) -> str:
    """The disk that a path is on: its device number and, for numbers are given anew, its model and size where known.

    Where the kernel knows no disk of that number (overlays, networks, memory), what is mounted there by name and kind.
    A path that does not exist yet is on its parent's.
    """
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    if not (blocks / _number(device)).exists() and (mount := _mounted_at(path.resolve())):
        source, kind = mount
        if not Path(source).is_block_device():
            return f"{source} {kind}".strip()
        device = Path(source).stat().st_rdev  # btrfs has numbers of its own for its parts
    number = _number(device)
    block = (blocks / number).resolve()  # of a disk, or of a partition inside of one
    texts = [_text(folder / "device" / "model") for folder in (block, block.parent)] + [_text(block / "size")]
    return " ".join([number, *filter(None, texts)])


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _mounted_at(path: Path) -> tuple[str, str] | None:
    """What is mounted where an absolute path is, and its kind, such as `server:/models` and `nfs4`."""
    mounts = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    nearest = max(reversed(mounts), key=lambda one: len(one.mountpoint), default=None)  # the last hides those before
    return None if nearest is None else (nearest.device, nearest.fstype)


def _text(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return ""


def reading_for(path: Path) -> Reading:
    """The best way to read files at this path, as far as it was measured."""
    measured = load_speeds().disks.get(disk_key(path))
    return measured.reading if measured else SAFE
