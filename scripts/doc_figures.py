"""The figures of docs/, as SVG, from real runs of the demo pair (figure_runs.py): no number is written down here.

    python scripts/doc_figures.py                 # all of them, some minutes
    python scripts/doc_figures.py race shard      # only these

Seconds are those of a throttled link, or of a clock that charges for everything: other work on the machine changes
little. Texts, trees and files are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import matplotlib
import numpy as np
from bootstrap import rate
from figure_runs import (
    STREAMED,
    Timeline,
    bursts,
    by_temperature,
    calibrated,
    chances,
    cost_model,
    decisive_place,
    packed_layer,
    shared_sweeps,
    timeline,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from cli.terminal.treeview import readable
from offload.checkpoint.quantized.quantize import Quant
from offload.packs.writer import DATA_START_B
from specexec import SamplingParams
from specexec.drafters.calibration import NEUTRAL_TAU
from specexec.tree.tree import ROOT, Floats, TokenTree

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
TARGET = FOLDER.parents[1] / "offload" / "demo" / "target"
INK, PALE, GRID, CARD = "#1f2328", "#8c959f", "#dfe3e8", "#fdfdfc"
BLUE, ORANGE, GREEN = "#0969da", "#c2410c", "#1a7f37"
STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none", "svg.hashsalt": "specexec", "font.size": 9, "axes.titlesize": 9.5,
    "figure.facecolor": CARD, "savefig.facecolor": CARD, "axes.facecolor": CARD,  # a card: legible on any page
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": PALE, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}  # fmt: skip
WIDE = 7.4  # inches, of 72 points


def race() -> Figure:
    """The same dice lead both models to the same unlikely token; other dice do not."""
    place = decisive_place()
    words = [readable(word) for word in place.tokens]
    figure, panels = _card(2.7, "target", "drafter, the same dice", "drafter, other dice", share=True)
    for panel, log_probs, scores in zip(panels, place.log_probs.numpy(), place.scores.numpy(), strict=True):
        colours = [ORANGE if score == scores.max() else PALE for score in scores]
        panel.hlines(words, log_probs, scores, colors=colours, linewidth=4, alpha=0.45)
        panel.scatter(log_probs, words, facecolors=CARD, edgecolors=colours, zorder=3)
        panel.scatter(scores, words, c=colours, zorder=3)
        panel.set_xlabel("○ log p     ● log p + G")
    return figure


def noise() -> Figure:
    """With the noise in sight, guessing at T = 1 is about as good as at T = 0."""
    warmths = list(by_temperature((0.0, 0.25, 0.5, 0.75, 1.0)))
    across = [one.temperature for one in warmths]
    figure, (left, right) = _card(2.8, "the first guess is the target's choice", "tokens per sweep, 32 guesses")
    for name, colour in (("shared noise", BLUE), ("no shared noise", ORANGE)):
        left.plot(across, [100 * one.agreed[name] for one in warmths], marker="o", color=colour, label=name)
        rates = np.array([rate(np.array([[len(a.tokens), a.sweeps] for a in one.answers[name]])) for one in warmths])
        right.plot(across, rates[:, 0], marker="o", color=colour, label=name)
        right.fill_between(across, rates[:, 1], rates[:, 2], color=colour, alpha=0.15)
    right.axhline(1.0, linestyle=":", color=INK, label="plain decoding")
    left.set(ylabel="% of all places", xlabel="temperature", ylim=(0, 100))
    right.set(xlabel="temperature", ylim=(0, None))
    for panel in (left, right):
        panel.legend(loc="lower left")
    return figure


def reliability() -> Figure:
    """How sure three drafters are of their best guess, and how often they are right, with tau neutral and learned."""
    drafters = {"the target itself": str(TARGET), "its small sibling": "sibling", "some of its sublayers": "skip"}
    figure, panels = _card(3.1, *drafters, share=True)
    for panel, drafter in zip(panels, drafters.values(), strict=True):
        found = calibrated(drafter)
        taus = (("neutral", NEUTRAL_TAU, ORANGE), ("learned", found.tau, BLUE))
        for (which, tau, colour), error, bins in zip(taus, found.expected_error, found.bins, strict=True):
            count, predicted, true = bins[:, bins[0] >= 5]  # fewer examples say nothing
            label = f"{which} τ = {tau:.2f}, off by {100 * error:.0f} %"
            panel.plot(predicted / count, true / count, marker="o", markersize=4, color=colour, label=label)
        panel.plot([0, 1], [0, 1], linestyle=":", color=INK)
        panel.set(xlabel="how sure it was", xlim=(0, 1.03), ylim=(0, 1.03))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=8)
    panels[0].set_ylabel("how often it was right")
    return figure


def tree() -> Figure:
    """The guesses of one sweep, each with the chance that the text runs through it; what was kept."""
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=40)
    done, words = bursts("The with statement is used to", 12, sampling)
    burst = max(done, key=lambda one: min(one.accepted, one.nodes - one.accepted))
    text = "".join(words[token] for before in done[: done.index(burst)] for token in before.tokens)
    figure, (panel,) = _card(3.3, "… " + " ".join(text.split())[-70:] + " …")
    rows = _rows(burst.tree)
    places = {ROOT: (0.0, 0.0), **{node: (depth + 1.0, rows[node]) for node, depth in enumerate(burst.tree.depth_N)}}
    for node, parent in enumerate(burst.tree.parents):
        colour = GREEN if node in burst.path else PALE
        panel.plot(*zip(places[parent], places[node], strict=True), color=colour, zorder=1)
        chance = 100 * np.exp(burst.tree.reach_N[node])
        _box(panel, places[node], f"{readable(words[burst.tree.tokens[node]])}\n{chance:.0f} %", colour)
    _box(panel, places[ROOT], "the text", INK)
    if own := burst.tokens[len(burst.path) :]:
        x, y = places[burst.path[-1] if burst.path else ROOT]
        free = min((row for column, row in places.values() if column == x + 1), default=y + 1) - 1
        panel.plot((x, x + 1), (y, free), color=BLUE, linestyle="--", zorder=1)
        _box(panel, (x + 1, free), f"{readable(words[own[0]])}\ntarget's own", BLUE)
    panel.axis("off")
    panel.margins(0.08, 0.12)
    return figure


def budget() -> Figure:
    """What one more guess earns and costs, on three machines; the dot is the budget that auto takes."""
    chance_N = chances(512)
    sizes: Floats = np.arange(len(chance_N) + 1.0)
    tokens = 1 + np.concatenate([[0.0], np.cumsum(chance_N)])
    figure, (left, right) = _card(2.8, "expected tokens of a sweep", "tokens per second, plain decoding = 1")
    left.plot(sizes, tokens, color=INK)
    machines = {"streams for 1 s": 1.0, "streams for 0.2 s": 0.2, "streams nothing": 0.0}
    for (name, stream_s), colour in zip(machines.items(), (BLUE, GREEN, ORANGE), strict=True):
        cost = cost_model((stream_s, *STREAMED[1:]))
        speed = tokens * cost.sweep_s(1.0) / cost.sweep_s(1.0 + sizes)
        best = cost.best_size(chance_N, 1, 1, 0.0)
        right.plot(sizes, speed, color=colour, label=f"{name}: best with {best}")
        right.scatter([best], [speed[best]], color=colour, zorder=3)
    for panel in (left, right):
        panel.set_xscale("symlog", base=2, linthresh=1)
        panel.set_xticks(ticks := [0, *(2**power for power in range(0, 10, 3))], list(map(str, ticks)))
        panel.set(xlabel="guesses in the tree", xlim=(0, None), ylim=(0, None))
    right.set_ylim(0, 1.4 * right.get_ylim()[1])
    right.legend(loc="upper left")
    return figure


def stream() -> Figure:
    """Three sweeps each of plain decoding and with a tree: what the reader and the arithmetic did when."""
    figure = Figure(figsize=(WIDE, 3.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, (name, nodes) in zip(panels, {"plain": 0, "a tree of 32 guesses": 32}.items(), strict=True):
        _gantt(panel, timeline(nodes, 4e6), name)
    panels[-1].set_xlabel("seconds")
    return figure


def _gantt(panel: Axes, seen: Timeline, name: str) -> None:
    """Three sweeps from the second one on, which finds the reader at work."""
    sweeps = seen.sweeps[1:4]
    zero, end = sweeps[0][0], sweeps[-1][1]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.95, 1 + max(layer for *_, layer in seen.computes)))
    buffers = 1 + max(buffer for *_, buffer in seen.reads)
    bars = [(began, ended, shades[layer], buffer) for began, ended, layer, buffer in seen.reads]
    bars += [(began, ended, shades[layer], buffers) for began, ended, layer in seen.computes]
    bars += [(began, ended, PALE, buffers + 1) for began, ended in seen.drafts]
    for began, ended, colour, row in (bar for bar in bars if bar[0] < end and bar[1] > zero):
        left, right = max(began, zero), min(ended, end)
        panel.barh(row, right - left, left=left - zero, color=colour, edgecolor=CARD, linewidth=0.3)
    for began, ended, layer, buffer in seen.reads:
        left, right = max(began, zero), min(ended, end)
        if right - left > 0.04 * (end - zero):
            panel.text((left + right) / 2 - zero, buffer, str(layer), ha="center", va="center")
    for _, ended, _ in sweeps:
        panel.axvline(ended - zero, color=INK, linewidth=0.8)
    tokens = " + ".join(str(len(burst.tokens)) for *_, burst in sweeps)
    panel.set_title(f"{name}: {tokens} tokens")
    panel.set_yticks(range(buffers + 2), [*(f"buffer {buffer}" for buffer in range(buffers)), "computing", "drafting"])
    panel.set_xlim(left=0)
    panel.set_ylim(-0.6, buffers + 1.6)
    panel.grid(axis="y", visible=False)


def shard() -> Figure:
    """Where each tensor of a packed layer lies, and how large the layer is in each format."""
    figure, (left, right) = _card(2.9, "layer-00000.safetensors, 16 bits", "the same layer, kB")
    _, entries = packed_layer("none")
    lying = sorted(entries.values(), key=lambda one: one.offset)
    names = [f"header, to {DATA_START_B}", *(one.name.partition("layers.0.")[2] for one in lying)]
    left.barh(names[0], DATA_START_B / 1000, color=PALE)
    for name, entry in zip(names[1:], lying, strict=True):
        left.barh(name, entry.nbytes / 1000, left=entry.offset / 1000, color=BLUE)
        left.annotate(f"{entry.offset // 64} × 64", ((entry.offset + entry.nbytes) / 1000, name), (3, 0),
                      textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    left.invert_yaxis()
    left.set(xlabel="kB from the beginning of the file", xlim=(0, 1.2 * (lying[-1].offset + lying[-1].nbytes) / 1000))
    left.tick_params(axis="y", labelsize=7.5)
    for quant in get_args(Quant):
        size_B, entries = packed_layer(quant)
        codes_B = sum(one.nbytes for one in entries.values() if one.name.endswith("proj.weight"))
        right.bar(quant, codes_B / 1000, color=BLUE, label="weights")
        right.bar(quant, (size_B - codes_B) / 1000, bottom=codes_B / 1000, color=ORANGE, label="all else")
        right.text(quant, size_B / 1000, f"{size_B / 1000:.0f}", ha="center", va="bottom")
    right.legend(["weights", "scales, norms, header"], loc="upper right")
    right.margins(y=0.3)
    return figure


def batch() -> Figure:
    """More texts in a sweep: smaller trees, more tokens, until arithmetic is the limit."""
    sizes = (1, 2, 4, 8, 16, 32)
    rows = list(shared_sweeps(sizes))
    figure, panels = _card(2.8, "guesses for each text", "tokens per sweep", "tokens per second")
    for kind, (name, colour) in enumerate((("trees", BLUE), ("plain", ORANGE))):
        ran = [pair[kind] for pair in rows]
        lines = (
            [one.row.nodes / one.row.sweeps / one.row.size for one in ran],
            [one.row.tokens / one.row.sweeps for one in ran],
            [one.row.tokens / one.seconds for one in ran],
        )
        for panel, line in zip(panels, lines, strict=True):
            panel.plot(sizes, line, marker="o", color=colour, label=name)
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, list(map(str, sizes)))
        panel.set(xlabel="texts", ylim=(0, None))
    panels[1].legend()
    return figure


def _card(high: float, *titles: str, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A panel for each title, side by side."""
    figure = Figure(figsize=(WIDE, high), layout="constrained")
    panels = list(figure.subplots(1, len(titles), sharex=share, sharey=share, squeeze=False)[0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
    return figure, panels


def _rows(guessed: TokenTree) -> dict[int, float]:
    """Leaves one below the other, parents in the middle of their children, the root at 0."""
    rows: dict[int, float] = {}
    leaves = iter(range(len(guessed) + 1))

    def settle(node: int) -> float:
        below = [settle(child) for child, parent in enumerate(guessed.parents) if parent == node]
        rows[node] = (below[0] + below[-1]) / 2 if below else -float(next(leaves))
        return rows[node]

    root = settle(ROOT)
    return {node: row - root for node, row in rows.items()}


def _box(panel: Axes, place: tuple[float, float], text: str, colour: str) -> None:
    frame = {"boxstyle": "round,pad=0.25", "facecolor": CARD, "edgecolor": colour}
    panel.text(*place, text, ha="center", va="center", fontsize=7.5, bbox=frame)


FIGURES: dict[str, Callable[[], Figure]] = {
    one.__name__: one for one in (race, noise, reliability, tree, budget, stream, shard, batch)
}


@click.command()
@click.argument("names", type=click.Choice(list(FIGURES)), nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Folder; docs/figures by default.")
def main(names: tuple[str, ...], out: Path) -> None:
    """Draw the figures of docs/, or only those named."""
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in names or FIGURES:
            path = out / f"{name}.svg"
            FIGURES[name]().savefig(path, metadata={"Date": None, "Title": FIGURES[name].__doc__})
            click.echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
