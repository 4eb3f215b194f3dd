"""GPUs by their common names: how much memory they have and how fast they compute, by their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from cli.shared.quantities import parse_size_B

# Name → memory in GiB, the usual variant first, and dense tensor operations per second in 16 bits that sum in 32.
_CARDS: dict[str, tuple[tuple[int, ...], float]] = {
    "RTX 3060": ((12, 8), 25.5e12), "RTX 3060 Ti": ((8,), 32.4e12), "RTX 3070": ((8,), 40.6e12),
    "RTX 3070 Ti": ((8,), 43.5e12), "RTX 3080": ((10, 12), 59.5e12), "RTX 3080 Ti": ((12,), 68.2e12),
    "RTX 3090": ((24,), 71.2e12), "RTX 3090 Ti": ((24,), 80e12),
    "RTX 4060": ((8,), 30e12), "RTX 4060 Ti": ((8, 16), 44e12), "RTX 4070": ((12,), 58e12),
    "RTX 4070 Super": ((12,), 71e12), "RTX 4070 Ti": ((12,), 80e12), "RTX 4070 Ti Super": ((16,), 88e12),
    "RTX 4080": ((16,), 97e12), "RTX 4080 Super": ((16,), 104e12), "RTX 4090": ((24,), 165e12),
    "RTX 5060": ((8,), 38.4e12), "RTX 5060 Ti": ((8, 16), 47.4e12), "RTX 5070": ((12,), 61.7e12),
    "RTX 5070 Ti": ((16,), 87.9e12), "RTX 5080": ((16,), 112.6e12), "RTX 5090": ((32,), 209.5e12),
    "RTX A6000": ((48,), 154.8e12), "RTX 6000 Ada": ((48,), 364e12), "RTX PRO 6000": ((96,), 504e12),
    "T4": ((16,), 65e12), "V100": ((16, 32), 125e12), "A10": ((24,), 125e12), "A100": ((40, 80), 312e12),
    "L4": ((24,), 121e12), "L40S": ((48,), 362e12), "H100": ((80,), 989e12), "H200": ((141,), 989e12),
}  # fmt: skip
_MEMORY = re.compile(r"[\s-]*\b(\d+)\s*(?:gb|gib|g)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A GPU that is not here: its name, its memory, and what it computes per second if that is known."""

    name: str
    memory_B: int
    flops: float | None = None


def card(text: str) -> Card:
    """The card of this name (4090, "RTX 4060 Ti 16GB"), or one of that size (12GiB).

    Memory in the name wins. Raises ValueError for others, with the names that come near.
    """
    memory = _MEMORY.search(text)
    wanted = _plain(text[: memory.start()] if memory else text)
    for name, (sizes_GiB, flops) in _CARDS.items():
        if _plain(name) == wanted:
            memory_GiB = int(memory[1]) if memory else sizes_GiB[0]
            several = f" {memory_GiB}GB" if len(sizes_GiB) > 1 or memory_GiB not in sizes_GiB else ""
            return Card(f"{name}{several}", memory_GiB << 30, flops)
    try:
        return Card("a GPU", parse_size_B(text))
    except ValueError as problem:
        near = get_close_matches(wanted, [_plain(name) for name in _CARDS], n=4, cutoff=0.6)
        names = [name.removeprefix("RTX ") for name in _CARDS if not near or _plain(name) in near]
        hint = f"; did you mean {text.strip()}GiB?" if text.strip().isdecimal() and not near else "."
        raise ValueError(f"{text!r} is no size and none of {', '.join(names)}{hint}") from problem


def _plain(name: str) -> str:
    """What all ways to write a name have in common."""
    return re.sub(r"\b(nvidia|geforce|tesla|rtx)\b|[\s_-]", "", name.lower().replace("rtx", "rtx "))
