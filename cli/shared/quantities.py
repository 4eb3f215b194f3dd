"""Sizes, speeds and counts as people write them: 10GiB, 4MB/s, 8k. Pure text in, numbers out, and back.

A number without a unit counts bytes, so one that is small for that is refused: 24 is written for 24GiB.
"""

from __future__ import annotations

import re

_DECIMAL = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
LEAST_BARE = 1 << 20  # bytes: fewer without a unit are taken for a forgotten unit
MOST = 1 << 63
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z/]*)\s*")


def parse_size_B(text: str) -> int:
    """`10GiB`, `512MB`, `1.5G` (a bare letter counts in 1024s) or a million bytes and more without a unit, as bytes."""
    number, unit = _split(text, "a size such as 10GiB or 512MB")
    prefix = unit[:1].upper()
    if unit.lower().endswith("ib") and len(unit) == 3 and prefix in _BINARY:
        scale = _BINARY[prefix]
    elif unit.lower() == "b":
        scale = 1
    elif not unit:
        _refuse_bare(text, number, "GiB")
        scale = 1
    elif unit[1:].lower() == "b" and prefix in _DECIMAL:
        scale = _DECIMAL[prefix]
    elif len(unit) == 1 and prefix in _BINARY:
        scale = _BINARY[prefix]
    else:
        raise ValueError(f"{text!r} is not a size; write 10GiB or 512MB")
    if number * scale >= MOST:
        raise ValueError(f"{text!r} is more than any machine has")
    return int(number * scale)


def parse_speed_Bps(text: str) -> float:
    """`4MB/s`, `1.5GiB/s` or `25GB`, as bytes per second; zero is refused because nothing would ever move."""
    size = text.strip().removesuffix("/s").removesuffix("/S")
    if "bit" in size.lower():
        raise ValueError(f"{text!r} counts bits; write bytes, such as 4MB/s")
    if (match := _NUMBER.fullmatch(size)) and not match[2]:
        _refuse_bare(size, float(match[1]), "GB/s")
    try:
        speed_Bps = float(parse_size_B(size))
    except ValueError:
        raise ValueError(f"{text!r} is not a speed; write 4MB/s or 25GB/s") from None
    if speed_Bps <= 0:
        raise ValueError(f"{text!r} would stop the weights altogether")
    return speed_Bps


def parse_count(text: str) -> int:
    """`8k` is 8192: context lengths are powers of two, and k means what model cards mean by it."""
    number, unit = _split(text, "a count such as 4096 or 8k")
    scales = {"": 1, "k": 1024, "m": 1024**2}
    count = number * scales.get(unit.lower(), 0)
    if unit.lower() not in scales or not 1 <= count < MOST or count != int(count):
        raise ValueError(f"{text!r} is not a count; write 4096 or 8k")
    return int(count)


def exact_size(size_B: int) -> str:
    """What `parse_size_B` turns back into the same bytes: 24GiB, 1500MB, 2000000001."""
    units = [*((f"{key}iB", scale) for key, scale in _BINARY.items()), *((f"{key}B", _DECIMAL[key]) for key in "KMG")]
    fitting = [(size_B // scale, unit) for unit, scale in units if size_B and size_B % scale == 0]
    number, unit = min(fitting, default=(size_B, "B" if size_B < LEAST_BARE else ""))
    return f"{number}{unit}"


def format_bytes(size_B: float) -> str:
    """Three digits and a decimal unit, as link speeds are sold: 6.1 MB, 36.9 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_B < 999.5:
            return f"{size_B:.0f} {unit}" if unit == "B" else f"{_three_digits(size_B)} {unit}"
        size_B /= 1000
    return f"{_three_digits(size_B)} TB"


def format_speed(speed_Bps: float) -> str:
    """22.1 GB/s."""
    return f"{format_bytes(speed_Bps)}/s"


def format_count(count: int) -> str:
    """1 204, with a space no reader mistakes for a decimal point."""
    return f"{count:,}".replace(",", " ")


def _split(text: str, wanted: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {wanted}")
    return float(match[1]), match[2]


def _refuse_bare(text: str, number: float, unit: str) -> None:
    if number < LEAST_BARE:
        raise ValueError(f"{text!r} has no unit; did you mean {text.strip()}{unit}?")


def _three_digits(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def in_json(seed: int) -> int | str:
    """As all who read JSON read it: many of them keep 53 bits of a number, so a longer one becomes text."""
    return seed if abs(seed) < 2**53 else str(seed)
