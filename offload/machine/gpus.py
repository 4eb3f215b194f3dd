"""GPUs as the system describes them: name, memory and the link they sit on. Starts neither torch nor CUDA.

NVIDIA's by its driver's own program, AMD's by what the kernel's driver shows of each PCI device.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
NAMES = (Path("/usr/share/misc/pci.ids"), Path("/usr/share/hwdata/pci.ids"))
AMD = "0x1002"
# Gigatransfers a second of a lane, by PCI Express generation.
SPEEDS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
# What copies from pinned RAM reach on a lane of the third generation; each later one has twice as much. Others measured
# 11 to 12 GB/s on 16 lanes of the third and 24 on those of the fourth.
LANE_Bps = 0.75e9


@dataclass(frozen=True)
class PciLink:
    """PCI Express between RAM and a card: its generation and its lanes."""

    generation: int
    lanes: int

    @property
    def Bps(self) -> float:
        """What copies may be expected to reach."""
        return LANE_Bps * 2.0 ** (self.generation - 3) * self.lanes

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.lanes}"


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; no CUDA is started to ask.

    `link` is that of the slot: an idle card may be slower for the moment. None where nothing tells, as on WSL.
    """

    name: str
    free_B: int
    total_B: int
    link: PciLink | None = None


def gpus(pci: Path = PCI, names: tuple[Path, ...] = NAMES) -> list[Gpu]:
    """What the drivers of NVIDIA and AMD report, nothing where there is none."""
    return [*_nvidia(), *_amd(pci, names)]


def _nvidia() -> Iterator[Gpu]:
    fields = "name,memory.free,memory.total,pcie.link.gen.max,pcie.link.width.current"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return
    for line in answer.splitlines():
        name, *numbers = (cell.strip() for cell in line.split(","))
        if len(numbers) == 4 and numbers[0].isdigit() and numbers[1].isdigit():
            link = PciLink(int(numbers[2]), int(numbers[3])) if all(map(str.isdigit, numbers[2:])) else None
            yield Gpu(name, int(numbers[0]) << 20, int(numbers[1]) << 20, link)


def _amd(pci: Path, names: tuple[Path, ...]) -> Iterator[Gpu]:
    for card in sorted(pci.glob("*")):
        total_B, used_B = (_number(card / f"mem_info_vram_{which}") for which in ("total", "used"))
        if _text(card / "vendor") == AMD and total_B is not None and used_B is not None and _lanes(card):
            yield Gpu(_named(card, names), total_B - used_B, total_B, _slot(card.resolve()))


def _slot(card: Path) -> PciLink | None:
    """The slowest link between the card and the processor: a card's own switch may be faster than its slot."""
    found = [link for place in (card, *card.parents) if (link := _lanes(place))]
    return min(found, key=lambda link: link.Bps, default=None)


def _lanes(place: Path) -> PciLink | None:
    """A graphics unit inside a processor has no link."""
    speed, lanes = _text(place / "max_link_speed").partition(" ")[0], _number(place / "current_link_width")
    try:
        generation = SPEEDS.get(float(speed))
    except ValueError:
        return None
    return PciLink(generation, lanes) if generation and lanes else None


def _named(card: Path, names: tuple[Path, ...]) -> str:
    """As the list of PCI devices calls it, which most systems have: `Navi 31 [Radeon RX 7900 XTX]`."""
    device = _text(card / "device").removeprefix("0x")
    for file in names:
        inside = False
        for line in _text(file).splitlines():
            if not line.startswith("\t"):
                inside = line.startswith(AMD.removeprefix("0x"))
            elif inside and line.startswith(f"\t{device} "):
                called = line.split(maxsplit=1)[1]
                bracketed = re.search(r"\[(.+)\]", called)
                return f"AMD {bracketed[1] if bracketed else called}"
    return f"AMD GPU {device}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\n ")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None
