"""What a run would do: counts and lengths, from the tokenizer and the weights' headers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cli.batch.eta import spelled
from cli.batch.input.items import Item
from cli.models.outlook import tokens_per_sweep
from cli.shared.options import EngineOptions
from cli.shared.quantities import format_bytes, format_count, format_speed
from cli.terminal.screen import Screen
from offload.hub.headers_only import list_drafters
from offload.hub.names import known
from offload.machine.speeds import ASSUMED_DISK_Bps, disk_key, load_speeds
from specexec.drafters.registry import parse
from specexec.errors import SpecexecError
from specexec.sampling.params import SamplingParams

if TYPE_CHECKING:
    from specexec.text.tokenizer import Encoding

BINS = (64, 256, 1024, 4096, 16384, 65536)


@dataclass
class Lengths:
    """Tokens of every good prompt, which ones do not fit, and the most that `writes` answers may have in all."""

    context: int
    tokens: list[int] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    copies: int = 0
    writes: int = 0
    most: int = 0

    def histogram(self) -> list[tuple[str, int]]:
        """How many prompts have how many tokens."""
        bounds = [0, *BINS, 1 << 62]
        counts = [sum(low < n <= high for n in self.tokens) for low, high in pairwise(bounds)]
        names = [f"≤ {format_count(high)}" for high in BINS] + [f"> {format_count(BINS[-1])}"]
        return [(name, count) for name, count in zip(names, counts, strict=True) if count]


@dataclass(frozen=True)
class Estimate:
    """The time if weights stream and the wire is what limits; `wire` says how its speed is known.

    `each` are the tokens of one answer a sweep, from few to many.
    """

    sweep_B: int
    wire_Bps: float
    wire: str
    together: int
    most: int
    each: tuple[int, int]

    @property
    def seconds(self) -> tuple[float, float]:
        """With many tokens a sweep, and with few."""
        few, many = (self.most / (self.together * each) for each in self.each)
        sweep_s = self.sweep_B / self.wire_Bps
        return many * sweep_s, few * sweep_s


def expected_tokens(options: EngineOptions) -> tuple[int, int]:
    """Tokens of one answer a sweep, from few to many, that `plan` expects of the same drafters."""
    guests = parse(options.load.drafter, known)
    drafters = list_drafters(options.model, guests.models, offline=options.load.offline)
    return tokens_per_sweep(
        len(drafters) + len((*guests.copies, *guests.heads)), "ngram" in guests.sources, options.load.budget
    )


def dry_run(
    items: Sequence[Item],
    target: Path,
    encoding: Encoding,
    context: int,
    sampling: SamplingParams,
    parallel: int,
    link_Bps: float | None,
    each: tuple[int, int],
) -> tuple[Lengths, Estimate | None]:
    """Lengths of all prompts, and how long their answers would take if there are any."""
    lengths = Lengths(context)
    for item in items:
        try:
            if item.problem is not None:
                raise item.problem
            counts = [len(encoding.encode(prompt, item.template)) for prompt in item.prompts]
        except SpecexecError as problem:
            lengths.bad.append((item.id, problem.what))
            continue
        count = max(counts)
        lengths.tokens.append(sum(counts))
        if count >= context:
            lengths.too_long.append((item.id, count))
        elif item.duplicate_of is not None:
            lengths.copies += 1
        else:
            lengths.writes += item.count
            longest = item.sampling(sampling).max_tokens
            lengths.most += sum(min(longest, context - one) for one in counts) * (item.count // len(counts))
    if not lengths.writes:
        return lengths, None
    sweep_B = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return lengths, Estimate(sweep_B, *_wire(target, link_Bps), min(parallel, lengths.writes), lengths.most, each)


def show(lengths: Lengths, estimate: Estimate | None, screen: Screen, *, as_json: bool) -> None:
    """On standard output: lines for people, or one JSON object."""
    report = {
        "items": len(lengths.tokens) + len(lengths.bad),
        "prompt_tokens": sum(lengths.tokens),
        "histogram": dict(lengths.histogram()),
        "too_long": [name for name, _ in lengths.too_long],
        "bad": [name for name, _ in lengths.bad],
        "copies": lengths.copies,
        "answer_tokens": lengths.most,
        "tokens_per_sweep": estimate and estimate.each,
        "seconds": estimate and estimate.seconds,
    }
    for line in [json.dumps(report, ensure_ascii=False)] if as_json else _described(lengths, estimate):
        screen.write(line + "\n")


def _described(lengths: Lengths, estimate: Estimate | None) -> list[str]:
    tokens = sorted(lengths.tokens)
    copies = f", {lengths.copies} copies of others" if lengths.copies else ""
    counts = f"{len(lengths.bad)} bad, {len(lengths.too_long)} too long{copies}"
    count = len(tokens) + len(lengths.bad)
    lines = [f"{count} item{'s' if count != 1 else ''}, {counts}"]
    if tokens:
        middle = tokens[len(tokens) // 2]
        lines.append(f"prompt tokens: {format_count(sum(tokens))} in all, median {middle}, longest {tokens[-1]}")
        most = max(count for _, count in lengths.histogram())
        lines += [f"  {name:>9} {count:>6} {'█' * round(30 * count / most)}" for name, count in lengths.histogram()]
    too_long = f"tokens, the context is {format_count(lengths.context)}"
    lines += [f"  {name}: {format_count(count)} {too_long}" for name, count in lengths.too_long]
    lines += [f"  {what}" if name in what else f"  {name}: {what}" for name, what in lengths.bad]
    if estimate is None:
        return lines
    low, high = estimate.each
    accepted = f"{low} to {high} tokens" if high > low else f"{low} token{'s' * (low > 1)}"
    return [
        *lines,
        f"answers: at most {format_count(estimate.most)} tokens",
        f"if every layer streams ({format_bytes(estimate.sweep_B)} a sweep at {estimate.wire}) and every answer is of "
        f"full length, {estimate.together} at a time, {accepted} a sweep each: {spelled(estimate.seconds)}",
    ]


def _wire(target: Path, link_Bps: float | None) -> tuple[float, str]:
    if link_Bps:
        return link_Bps, "--link-limit"
    disk = load_speeds().disks.get(disk_key(target))
    if disk is None:
        return ASSUMED_DISK_Bps, f"{format_speed(ASSUMED_DISK_Bps)}, assumed"
    return disk.Bps, f"{format_speed(disk.Bps)}, measured"
