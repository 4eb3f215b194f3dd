"""The table of `specexec bench` as a picture. matplotlib is an extra: `pip install specexec[plot]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cli.shared.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cli.bench.rounds import Row


def check_extra() -> None:
    """Raises MissingExtra before anything is measured that could not be drawn."""
    if find_spec("matplotlib") is None:
        raise MissingExtra(
            "--plot needs matplotlib, which is not installed.",
            hint=f"{Path(sys.executable).name} -m pip install 'specexec[plot]', or -o csv.",
        )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Tokens per sweep and per second by budget, acceptance by depth, and where a sweep's seconds went; as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    sweeps, speed, depth, seconds = figure.subplots(2, 2).flat
    for name, of_setting in _settings(rows).items():
        guessed = [row for row in of_setting if row.budget != "0"]
        budgets = [row.budget for row in guessed]
        sweeps.plot(budgets, [row.tokens_per_sweep for row in guessed], marker="o", label=name)
        errors = [row.tokens_per_s_sd for row in guessed]
        line = speed.errorbar(budgets, [row.tokens_per_s for row in guessed], errors, marker="o", capsize=3, label=name)
        plain = next(row for row in of_setting if row.budget == "0")
        speed.axhline(plain.tokens_per_s, linestyle=":", color=line.lines[0].get_color(), label=f"{name}, plain")
        for row in guessed:
            depth.plot(
                range(1, len(row.accepted_by_depth) + 1), row.accepted_by_depth, label=f"{name}, budget {row.budget}"
            )
    sweeps.axhline(1.0, linestyle=":", color="grey", label="plain")
    _seconds(seconds, rows)
    _dress(sweeps, "tokens per sweep", "budget")
    _dress(speed, "tokens per second (± s.d. over rounds)", "budget")
    _dress(depth, "share of sweeps that accept a guess this deep", "depth")
    figure.savefig(path, dpi=120, format="png")


def _settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in the budget only; the plain row of each carries the drafter's name here too."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.asked}, {row.offload}, {row.planner}, T = {row.temperature:g}", []).append(row)
    return found


def _seconds(axes: Axes, rows: Sequence[Row]) -> None:
    names = [f"{row.asked} T{row.temperature:g}\n{'plain' if row.budget == '0' else row.budget}" for row in rows]
    places, bottom = range(len(rows)), [0.0] * len(rows)
    parts = {
        "drafting": [row.draft_s for row in rows],
        "waiting for weights": [row.stream_s for row in rows],
        "computing": [row.compute_s for row in rows],
    }
    for label, heights in parts.items():
        axes.bar(places, heights, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(places, names, fontsize=6, rotation=45)
    _dress(axes, "seconds per sweep", "")


def _dress(axes: Axes, title: str, across: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.legend(fontsize=6)
