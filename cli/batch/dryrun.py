"""What a run would do: counts and lengths, from the tokenizer and the weights' headers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cli.batch.eta import spelled
from cli.batch.items import Item
from cli.quantities import format_bytes, format_count
from cli.screen import Screen
from specexec.errors import SpecexecError
from specexec.sampling import SamplingParams

if TYPE_CHECKING:
    from specexec.encoding import Encoding

ASSUMED_BPS = 3e9  # of an SSD nobody has measured
TOKENS_PER_SWEEP = (2.0, 8.0)  # of one answer
BINS = (64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Lengths:
    """Tokens of every good prompt, and which ones do not fit."""

    tokens: list[int]
    too_long: list[tuple[str, int]]
    bad: list[tuple[str, str]]
    copies: int = 0

    def histogram(self) -> list[tuple[str, int]]:
        """How many prompts have how many tokens."""
        bounds = [0, *BINS, 1 << 62]
        counts = [sum(low < n <= high for n in self.tokens) for low, high in pairwise(bounds)]
        names = [f"≤ {format_count(high)}" for high in BINS] + [f"> {format_count(BINS[-1])}"]
        return [(name, count) for name, count in zip(names, counts, strict=True) if count]


def dry_run(
    items: Sequence[Item],
    target: Path,
    encoding: Encoding,
    context: int,
    sampling: SamplingParams,
    parallel: int,
    link_Bps: float | None,
) -> tuple[Lengths, list[str]]:
    """Lengths of all prompts and the lines that describe the run."""
    lengths = Lengths([], [], [], sum(item.duplicate_of is not None for item in items))
    for item in items:
        try:
            if item.problem is not None:
                raise item.problem
            count = len(encoding.encode(item.prompt))
        except SpecexecError as problem:
            lengths.bad.append((item.id, problem.what))
            continue
        lengths.tokens.append(count)
        if count >= context:
            lengths.too_long.append((item.id, count))
    return lengths, _described(lengths, context, _speed(lengths, target, sampling, parallel, link_Bps))


def show(lengths: Lengths, lines: list[str], screen: Screen, *, as_json: bool) -> None:
    """On standard output: lines for people, or one JSON object."""
    if as_json:
        report = {
            "items": len(lengths.tokens) + len(lengths.bad),
            "prompt_tokens": sum(lengths.tokens),
            "histogram": dict(lengths.histogram()),
            "too_long": [name for name, _ in lengths.too_long],
            "bad": [name for name, _ in lengths.bad],
            "copies": lengths.copies,
        }
        lines = [json.dumps(report, ensure_ascii=False)]
    for line in lines:
        screen.write(line + "\n")


def _described(lengths: Lengths, context: int, speed: list[str]) -> list[str]:
    tokens = sorted(lengths.tokens)
    copies = f", {lengths.copies} copies of others" if lengths.copies else ""
    counts = f"{len(lengths.bad)} bad, {len(lengths.too_long)} too long{copies}"
    lines = [f"{len(tokens) + len(lengths.bad)} items, {counts}"]
    if tokens:
        middle = tokens[len(tokens) // 2]
        lines.append(f"prompt tokens: {format_count(sum(tokens))} in all, median {middle}, longest {tokens[-1]}")
        most = max(count for _, count in lengths.histogram())
        lines += [f"  {name:>9} {count:>6} {'█' * round(30 * count / most)}" for name, count in lengths.histogram()]
    lines += [f"  {name}: {format_count(count)} tokens, the context is {context}" for name, count in lengths.too_long]
    lines += [f"  {what}" if name in what else f"  {name}: {what}" for name, what in lengths.bad]
    return lines + speed


def _speed(
    lengths: Lengths, target: Path, sampling: SamplingParams, parallel: int, link_Bps: float | None
) -> list[str]:
    """The time if weights stream and the wire is what limits; an assumption says that it is one."""
    count = len(lengths.tokens) - len(lengths.too_long) - lengths.copies
    if count <= 0:
        return []
    sweep_B = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    sweep_s = sweep_B / (link_Bps or ASSUMED_BPS)
    most = count * sampling.max_tokens
    sweeps = [most / (min(parallel, count) * each) for each in reversed(TOKENS_PER_SWEEP)]
    wire = "--link-limit" if link_Bps else f"{format_bytes(ASSUMED_BPS)}/s, assumed"
    return [
        f"answers: at most {format_count(most)} tokens",
        f"if every layer streams ({format_bytes(sweep_B)} a sweep at {wire}) and every answer is of full length, "
        f"{min(parallel, count)} at a time: {spelled((sweeps[0] * sweep_s, sweeps[1] * sweep_s))}",
    ]
