"""The measuring behind `specexec bench`: rounds of the same prompts, settings in turn so that all meet any slowdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from cli.shared.quantities import format_bytes
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams
from specexec.stats import Overlap

if TYPE_CHECKING:
    from specexec.engine.engine import Engine
    from specexec.text.messages import Prompt

COLUMNS = (
    "drafter", "offload", "planner", "T", "budget", "sweeps", "tok/sweep", "accepted at depth 1, 2, 4, 8", "s drafting",
    "hidden by overlap", "s waiting", "s computing", "tok/s", "vs plain", "calibration error", "memory", "same text",
)  # fmt: skip


@dataclass
class Round:
    """What one pass over all prompts came to."""

    tokens: int = 0
    sweeps: int = 0
    overlap: Overlap = field(default_factory=Overlap)
    stream_s: float = 0.0
    seconds: float = 0.0
    bytes_read: int = 0
    memory_B: int = 0
    texts: list[tuple[int, ...]] = field(default_factory=list)
    depths: Counter[int] = field(default_factory=Counter)  # accepted guesses by depth
    bins: Any = 0.0  # what the drafter predicted and what came true (calibration.py), an array


@dataclass(frozen=True)
class Row:
    """One setting. Means over rounds, `_sd` their standard deviation; seconds are those of one sweep: drafting that
    decoding waited for, arithmetic waiting for weights, the rest. `accepted_by_depth[d]` is the share of sweeps that
    accepted a guess at depth d (0 = next token). `memory_B` is the most the process held after a prompt, RAM and GPU.
    `of_bound`: for rules over drawn children, what was accepted as a share of what any rule could have (alpha*).
    `calibration_error`: how far the chance that a drafter model gave its best guess lay from the truth, with the
    neutral tau and the learned. `hit_rate`: share of the sweeps with drafting meanwhile after which the text went where
    that had gone; None without any. `hidden`: about the share of the drafting that decoding did not wait for (stats.py,
    Overlap). `facts`: what came of the options, for JSON."""

    asked: str
    drafter: str
    offload: str
    planner: str
    temperature: float
    budget: str
    sweeps: int
    tokens_per_sweep: float
    draft_s: float
    stream_s: float
    compute_s: float
    tokens_per_s: float
    tokens_per_s_sd: float
    vs_plain: float
    same_texts: int
    texts: int
    bytes_per_sweep: int
    memory_B: int
    accepted_by_depth: tuple[float, ...]
    of_bound: float | None = None
    calibration_error: tuple[float, float] | None = None
    hit_rate: float | None = None
    hidden: float = 0.0
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, ...]:
        """For COLUMNS."""
        return (
            self.drafter, self.offload, self.planner, f"{self.temperature:g}", self.budget, str(self.sweeps),
            f"{self.tokens_per_sweep:.2f}", self._depths, f"{self.draft_s:.4f}", self._hidden, f"{self.stream_s:.4f}",
            f"{self.compute_s:.4f}", f"{self.tokens_per_s:.2f} ± {self.tokens_per_s_sd:.2f}", f"{self.vs_plain:.2f}×",
            self._calibration, format_bytes(self.memory_B), f"{self.same_texts}/{self.texts}",
        )  # fmt: skip

    @property
    def _calibration(self) -> str:
        if self.calibration_error is None:
            return "–"
        before, after = self.calibration_error
        return f"{before:.3f} → {after:.3f}"

    @property
    def _hidden(self) -> str:
        return "–" if self.hit_rate is None else f"{self.hidden:.0%}, {self.hit_rate:.0%} hits"

    @property
    def _depths(self) -> str:
        shares = [self.accepted_by_depth[d - 1] if d <= len(self.accepted_by_depth) else 0.0 for d in (1, 2, 4, 8)]
        return " ".join(f"{share:.2f}" for share in shares)


def measure(
    llm: Engine,
    asked: str,
    planner: str,
    prompts: Sequence[Prompt],
    budgets: Sequence[str],
    sampling: SamplingParams,
    repeat: int,
    screen: Screen,
) -> list[Row]:
    """A row for each budget; budget 0 comes first and is what the others are compared with.

    `asked` is how the drafter was typed, `planner` how its trees grow.
    """
    assert budgets[0] == "0"
    _answer(llm, prompts[:1], "8", replace(sampling, max_tokens=8))  # warm up
    rounds: dict[str, list[Round]] = {budget: [] for budget in budgets}
    for turn in range(repeat):
        for budget in budgets:
            screen.say(f"round {turn + 1} of {repeat}, T = {sampling.temperature:g}, budget {budget}")
            rounds[budget].append(_answer(llm, prompts, budget, sampling))
    plain = rounds["0"]
    return [_row(llm, asked, planner, budget, rounds[budget], plain, sampling) for budget in budgets]


def _answer(llm: Engine, prompts: Sequence[Prompt], budget: str, sampling: SamplingParams) -> Round:
    llm.budget = "auto" if budget == "auto" else int(budget)
    done, learned = Round(), llm.calibration(sampling)
    before = 0.0 if learned is None else learned.bins.copy()
    for seed, prompt in enumerate(prompts):
        if llm.memory is not None:
            llm.memory.forget_past()  # rounds repeat their prompts: remembering them would measure the repetition
        began = perf_counter()
        bursts = [burst for burst in llm.stream(prompt, replace(sampling, seed=seed)) if burst.tokens]
        done.seconds += perf_counter() - began
        done.texts.append(tuple(token for burst in bursts for token in burst.tokens))
        done.tokens += len(done.texts[-1])
        done.sweeps += len(bursts)
        done.overlap = sum((burst.overlap for burst in bursts), done.overlap)
        done.stream_s += sum(burst.cost.wait_s for burst in bursts)
        done.memory_B = max(done.memory_B, memory_B(llm.device))
        done.bytes_read += sum(burst.bytes_read for burst in bursts)
        done.depths.update(depth for burst in bursts for depth in range(burst.accepted))
    done.bins = 0.0 if learned is None else learned.bins - before
    return done


def _row(
    llm: Engine,
    asked: str,
    planner: str,
    budget: str,
    rounds: list[Round],
    plain: list[Round],
    sampling: SamplingParams,
) -> Row:
    speeds = [one.tokens / one.seconds for one in rounds]
    sweeps, tokens = sum(one.sweeps for one in rounds), sum(one.tokens for one in rounds)
    both = zip(rounds, plain, strict=True)
    pairs = [pair for ours, theirs in both for pair in zip(ours.texts, theirs.texts, strict=True)]
    deepest = max((depth for one in rounds for depth in one.depths), default=-1)
    overlap = sum((one.overlap for one in rounds), Overlap())
    draft_s, stream_s = overlap.draft_s, sum(one.stream_s for one in rounds)
    return Row(
        asked=asked,
        drafter="none" if budget == "0" else llm.drafter_name,
        offload=llm.placement.partition(":")[0],
        planner=planner,
        temperature=sampling.temperature or 0.0,
        budget=budget,
        sweeps=sweeps,
        tokens_per_sweep=tokens / sweeps,
        draft_s=draft_s / sweeps,
        stream_s=stream_s / sweeps,
        compute_s=max(sum(one.seconds for one in rounds) - draft_s - stream_s, 0.0) / sweeps,
        tokens_per_s=mean(speeds),
        tokens_per_s_sd=stdev(speeds) if len(speeds) > 1 else 0.0,
        vs_plain=mean(speeds) / mean(one.tokens / one.seconds for one in plain),
        same_texts=sum(ours == theirs for ours, theirs in pairs),
        texts=len(pairs),
        bytes_per_sweep=sum(one.bytes_read for one in rounds) // sweeps,
        memory_B=max(one.memory_B for one in rounds),
        accepted_by_depth=tuple(sum(one.depths[d] for one in rounds) / sweeps for d in range(deepest + 1)),
        calibration_error=_calibration_error(rounds),
        hit_rate=overlap.hit_rate,
        hidden=overlap.hidden,
    )


def _calibration_error(rounds: list[Round]) -> tuple[float, float] | None:
    from specexec.drafters.calibration import expected_error

    bins = sum(one.bins for one in rounds)
    return expected_error(bins) if np.any(bins) else None


def memory_B(device: str) -> int:
    """What this process holds now: RAM, and the most it has held of the GPU's."""
    held_B = int(psutil.Process().memory_info().rss)
    if device.startswith("cuda"):
        import torch

        held_B += int(torch.cuda.max_memory_allocated())
    return held_B
