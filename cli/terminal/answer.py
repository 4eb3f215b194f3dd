"""One answer: printed burst by burst while the engine writes it, then summed up in one line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cli.shared.quantities import format_bytes, format_speed
from cli.terminal.escape import escape_calls
from cli.terminal.interrupts import Interrupts
from cli.terminal.meter import Metered, SweepMeter
from cli.terminal.screen import Screen
from cli.terminal.treeview import draw
from specexec.stats import Limit, Overlap

if TYPE_CHECKING:
    from specexec.stats import Burst
    from specexec.text.formats import Piece


class Writer(Metered, Protocol):
    """What writes an answer, as far as the screen is concerned."""

    @property
    def drafter_name(self) -> str: ...

    def decode(self, tokens: list[int]) -> str: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What the sweeps of one answer came to."""

    tokens: int = 0
    sweeps: int = 0
    drafted: int = 0
    kept: tuple[int, ...] = ()  # guesses that became text, sweep by sweep
    replaced: tuple[int, ...] = ()  # tokens that the model would not have chosen, step by step
    unread: int = 0  # tokens of the prompt that it was not shown
    kv_dropped: int = 0  # tokens of the prompt whose keys and values it wrote without
    overlap: Overlap = field(default_factory=Overlap)
    sweep_s: float = 0.0
    bytes_read: int = 0
    seconds: float = 0.0
    seed: int | None = None
    finish_reason: str | None = None
    limit: Limit | None = None
    exit_code: int = 0
    abandoned_s: float | None = None  # when a second Ctrl-C cut a layer short, by the monotonic clock
    last: Burst | None = None

    @property
    def accepted(self) -> int:
        """Guesses that became text."""
        return sum(self.kept)

    def after(self, burst: Burst) -> Answer:
        """The sum with one more burst. A sweep that was stopped before it gave a token is not counted as one."""
        return replace(
            self,
            tokens=self.tokens + len(burst.tokens),
            sweeps=self.sweeps + bool(burst.tokens),
            drafted=self.drafted + burst.nodes,
            kept=(*self.kept, burst.accepted) if burst.tokens else self.kept,
            replaced=(*self.replaced, burst.replaced) if burst.replaced else self.replaced,
            unread=burst.unread,
            kv_dropped=burst.kv_dropped,
            overlap=self.overlap + burst.overlap,
            sweep_s=self.sweep_s + burst.sweep_s,
            bytes_read=self.bytes_read + burst.bytes_read,
            seed=burst.seed,
            finish_reason=burst.finish_reason,
            limit=burst.limit,
            last=burst if burst.tokens else self.last,
        )


def play(
    engine: Writer, bursts: Iterator[Burst], screen: Screen, meter: SweepMeter, *,
    tree: bool = False, hide_thoughts: bool = False, calls_run: bool = False,
) -> Answer:  # fmt: skip
    """Print an answer as it comes. Ctrl-C stops it and keeps what there is; SIGTERM too (see Answer.exit_code).

    Calls are part of the answer, or remarks if something comes of them (`calls_run`).
    """
    answer, thinking = Answer(), False
    started_s = time.perf_counter()

    def acknowledge() -> None:
        meter.stopping = True
        if not screen.live:
            screen.tell("stopping…")

    def show(piece: Piece) -> None:
        nonlocal thinking
        if piece.reasoning:
            thinking = True
            if not hide_thoughts:
                screen.write(piece.reasoning, thought=True)
        if thinking and (piece.content or piece.calls):
            thinking = False
            screen.end_line()
            screen.say(f"  thought for {_many(answer.tokens, 'token')}, {time.perf_counter() - started_s:.1f} s")
        screen.write(piece.content)
        for call in piece.calls:
            screen.end_line()
            (screen.tell if calls_run else screen.write_line)(f"→ {call.name}({call.arguments})")

    with Interrupts(engine.stop, acknowledge) as interrupts, escape_calls(interrupts.ask):
        try:
            with screen.status(meter.lines):
                for burst in bursts:
                    interrupts.check()
                    answer = answer.after(burst)
                    show(burst.piece)
                    meter.next_sweep(burst)
                    meter.thinking = thinking and hide_thoughts
                    screen.title(f"● {answer.tokens / (time.perf_counter() - started_s):.1f} tok/s")
                    if tree:
                        screen.end_line()
                        screen.say(draw(burst, engine.decode, screen.width, answer.sweeps, engine.drafter_name))
        except KeyboardInterrupt:
            answer = replace(answer, finish_reason="interrupted", abandoned_s=time.monotonic())
        finally:
            screen.end_line()
    return replace(answer, seconds=time.perf_counter() - started_s, exit_code=interrupts.exit_code)


def stats_line(answer: Answer, *, sampled: bool, link_limit_Bps: float | None, lossy: Sequence[str] = ()) -> str:
    """The cost of an answer on one line: `45 tokens · 0.9 s · 50.0 tok/s · 9 sweeps · …`."""
    facts = [
        _many(answer.tokens, "token"),
        f"{answer.seconds:.1f} s",
        f"{answer.tokens / max(answer.seconds, 1e-9):.1f} tok/s",
        _many(answer.sweeps, "sweep"),
        f"{answer.tokens / max(answer.sweeps, 1):.1f} tok/sweep",
    ]
    if answer.drafted:
        facts.append(f"{answer.accepted} of {answer.drafted} guesses kept")
    if answer.bytes_read:
        facts.append(f"{format_bytes(answer.bytes_read)} at {format_speed(answer.bytes_read / answer.seconds)}")
    if sampled:
        facts.append(f"seed {answer.seed}")
    if link_limit_Bps is not None:
        facts.append(f"link limited to {format_speed(link_limit_Bps)}")
    if lossy:
        facts.append(lossy_fact(answer, lossy))
    return "  " + " · ".join(facts)


def lossy_fact(answer: Answer, lossy: Sequence[str]) -> str:
    """What may have changed the text, and how much it did."""
    did = {
        "steps": f"{_many(len(answer.replaced), 'step')} replaced, {_many(sum(answer.replaced), 'sweep')} saved",
        "prompt": f"{answer.unread} tokens of the prompt not read",
        "kv": f"keys and values of {answer.kv_dropped} tokens of the prompt dropped",
    }
    return f"LOSSY {' '.join(lossy)}: {', '.join(did[way] for one in lossy if (way := one.partition('=')[0]) in did)}"


def long_stats(answer: Answer, placement: str) -> list[str]:
    """Where the time of an answer went, and how deep its guesses held."""
    each, ahead = max(answer.sweeps, 1), answer.overlap
    other_s = max(0.0, answer.seconds - answer.sweep_s - ahead.draft_s)
    parts = [("sweep", answer.sweep_s), ("drafting", ahead.draft_s), ("other", other_s)]
    held = [sum(kept > depth for kept in answer.kept) / each for depth in range(max(answer.kept, default=0))]
    lines = [
        f"  per sweep  {answer.seconds / each:.3f} s = " + " + ".join(f"{name} {s / each:.3f}" for name, s in parts),
        f"  tokens     {answer.tokens / each:.1f} per sweep, {answer.accepted} of {answer.drafted} guesses kept",
        f"  where      {placement}",
    ]
    if held:
        lines.insert(2, "  by depth   " + " ".join(f"{share:.2f}".removeprefix("0") for share in held[:16]))
    if ahead.hit_rate is not None:
        lines.append(
            f"  ahead      in {ahead.hits} of {ahead.hits + ahead.misses} sweeps the text went where the drafter "
            f"had drafted ahead: that hid about {ahead.hidden:.0%} of the drafting"
        )
    if answer.bytes_read:
        speed = format_speed(answer.bytes_read / max(answer.sweep_s, 1e-9))
        lines.append(f"  link       {format_bytes(answer.bytes_read / each)} per sweep at {speed}")
    return lines


def ending(answer: Answer, max_tokens: int, context: int, *, once: bool = False) -> str | None:
    """What to know about an answer that did not end by itself; `once`: no dialogue goes on behind it."""
    if answer.limit == "context":
        help = "a longer --ctx helps" if once else "/on-full, /undo, /clear or a longer --ctx help"
        return f"  stopped: the context of {context} tokens is full; {help}"
    if answer.finish_reason == "length":
        return f"  stopped at --max-tokens {max_tokens}; {'-n for more' if once else '/continue for more'}"
    if answer.finish_reason == "interrupted" and not answer.tokens:
        return "  stopped before the first token"
    if answer.finish_reason == "interrupted":
        kept = "" if once else "; the partial answer is kept"
        return f"  stopped after {_many(answer.tokens, 'token')}{kept}"
    return None


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
