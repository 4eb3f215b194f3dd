"""GPUs by their common names: how much memory they have and how fast they compute, by their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from cli.shared.quantities import parse_size_B
from offload.machine.gpus import PciLink

# Name → memory in GiB, the usual variant first; dense matrix operations per second in 16 bits that sum in 32; PCI
# Express, generation and lanes.
_CARDS: dict[str, tuple[tuple[int, ...], float, int, int]] = {
    "RTX 3060": ((12, 8), 25.5e12, 4, 16), "RTX 3060 Ti": ((8,), 32.4e12, 4, 16),
    "RTX 3070": ((8,), 40.6e12, 4, 16), "RTX 3070 Ti": ((8,), 43.5e12, 4, 16), "RTX 3080": ((10, 12), 59.5e12, 4, 16),
    "RTX 3080 Ti": ((12,), 68.2e12, 4, 16), "RTX 3090": ((24,), 71.2e12, 4, 16), "RTX 3090 Ti": ((24,), 80e12, 4, 16),
    "RTX 4060": ((8,), 30e12, 4, 8), "RTX 4060 Ti": ((8, 16), 44e12, 4, 8), "RTX 4070": ((12,), 58e12, 4, 16),
    "RTX 4070 Super": ((12,), 71e12, 4, 16), "RTX 4070 Ti": ((12,), 80e12, 4, 16),
    "RTX 4070 Ti Super": ((16,), 88e12, 4, 16), "RTX 4080": ((16,), 97e12, 4, 16),
    "RTX 4080 Super": ((16,), 104e12, 4, 16), "RTX 4090": ((24,), 165e12, 4, 16),
    "RTX 5060": ((8,), 38.4e12, 5, 8), "RTX 5060 Ti": ((8, 16), 47.4e12, 5, 8), "RTX 5070": ((12,), 61.7e12, 5, 16),
    "RTX 5070 Ti": ((16,), 87.9e12, 5, 16), "RTX 5080": ((16,), 112.6e12, 5, 16), "RTX 5090": ((32,), 209.5e12, 5, 16),
    "RTX 3050": ((8, 6), 18.2e12, 4, 8),
    "RTX 2060 Super": ((8,), 28.7e12, 3, 16), "RTX 2070 Super": ((8,), 36.3e12, 3, 16),
    "RTX 2080 Super": ((8,), 44.6e12, 3, 16), "RTX 2080 Ti": ((11,), 53.8e12, 3, 16),
    "RTX A6000": ((48,), 154.8e12, 4, 16), "RTX 6000 Ada": ((48,), 364e12, 4, 16),
    "RTX PRO 6000": ((96,), 504e12, 5, 16),
    "T4": ((16,), 65e12, 3, 16), "V100": ((16, 32), 125e12, 3, 16), "A10": ((24,), 125e12, 4, 16),
    "A100": ((40, 80), 312e12, 4, 16), "L4": ((24,), 121e12, 4, 16), "L40S": ((48,), 362e12, 4, 16),
    "H100": ((80,), 989e12, 5, 16), "H200": ((141,), 989e12, 5, 16),
    "RX 6700 XT": ((12,), 26.4e12, 4, 16), "RX 6800": ((16,), 32.3e12, 4, 16), "RX 6800 XT": ((16,), 41.5e12, 4, 16),
    "RX 6900 XT": ((16,), 46.1e12, 4, 16), "RX 7600": ((8,), 43.5e12, 4, 8), "RX 7600 XT": ((16,), 45.1e12, 4, 8),
    "RX 7700 XT": ((12,), 70.3e12, 4, 16), "RX 7800 XT": ((16,), 74.7e12, 4, 16), "RX 7900 GRE": ((16,), 92e12, 4, 16),
    "RX 7900 XT": ((20,), 103e12, 4, 16), "RX 7900 XTX": ((24,), 122.8e12, 4, 16),
    "RX 9060 XT": ((16, 8), 103e12, 5, 16), "RX 9070": ((16,), 145e12, 5, 16), "RX 9070 XT": ((16,), 195e12, 5, 16),
    "AI PRO R9700": ((32,), 191e12, 5, 16), "PRO W7900": ((48,), 122.6e12, 4, 16),
    "Arc A750": ((8,), 114e12, 4, 16), "Arc A770": ((16, 8), 131e12, 4, 16), "Arc B570": ((10,), 101e12, 4, 8),
    "Arc B580": ((12,), 116e12, 4, 8), "Arc Pro B50": ((16,), 85e12, 5, 8), "Arc Pro B60": ((24,), 98e12, 5, 8),
}  # fmt: skip
_MEMORY = re.compile(r"[\s-]*\b(\d+)\s*(?:gb|gib|g)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A GPU that is not here: its name, its memory, what it computes per second and its link, if those are known."""

    name: str
    memory_B: int
    flops: float | None = None
    link: PciLink | None = None


def card(text: str) -> Card:
    """The card of this name (4090, "RTX 4060 Ti 16GB"), or one of that size (12GiB).

    Memory in the name wins. Raises ValueError for others, with the names that come near.
    """
    memory = _MEMORY.search(text)
    wanted = _plain(text[: memory.start()] if memory else text)
    for name, (sizes_GiB, flops, generation, lanes) in _CARDS.items():
        if _plain(name) == wanted:
            memory_GiB = int(memory[1]) if memory else sizes_GiB[0]
            several = f" {memory_GiB}GB" if len(sizes_GiB) > 1 or memory_GiB not in sizes_GiB else ""
            return Card(f"{name}{several}", memory_GiB << 30, flops, PciLink(generation, lanes))
    try:
        return Card("a GPU", parse_size_B(text))
    except ValueError as problem:
        near = get_close_matches(wanted, [_plain(name) for name in _CARDS], n=4, cutoff=0.6)
        names = [name.removeprefix("RTX ") for name in _CARDS if not near or _plain(name) in near]
        hint = f"; did you mean {text.strip()}GiB?" if text.strip().isdecimal() and not near else "."
        raise ValueError(f"{text!r} is no size and none of {', '.join(names)}{hint}") from problem


def link_of(driver_name: str) -> PciLink | None:
    """The link that a card was made for, by the name that its driver gives it; None for one that is not known.

    A card in a laptop may have fewer lanes than its namesake.
    """
    name = re.sub(r"^(AMD|Intel\(R\))\s", "", driver_name)
    try:
        return None if "laptop" in name.lower() else card(name).link
    except ValueError:
        return None


def _plain(name: str) -> str:
    """What all ways to write a name have in common."""
    apart = re.sub("rtx|rx", r"\g<0> ", name.lower())
    return re.sub(r"\b(nvidia|geforce|tesla|rtx|radeon|rx|graphics)\b|[\s_-]", "", apart)
