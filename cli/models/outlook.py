"""Every way to run a model here, each with its memory and its speed, or why not. Arithmetic on headers; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cli.shared.options import IntOrAuto
from offload.checkpoint.headers import Folder
from offload.errors import OffloadError
from offload.hub.headers_only import item_B
from offload.machine.memory import Free
from offload.placement.forecast import Ceilings, Forecast, Moved, Work, forecast, moved
from offload.placement.placement import Need, Offload, Placement
from offload.placement.quantized_sizes import (
    FORMATS,
    FewBits,
    Format,
    FourBits,
    is_quantised,
    looked_up_B,
    need_in,
    resident_B,
    with_head,
    work_of,
)
from offload.placement.requirements import cache_B
from offload.placement.solver import place
from specexec.sizes import Widths, drafting_B, guesses_B, nodes_of, widths_of, workspace

MODES: tuple[Offload, ...] = ("none", "ram", "disk", "auto")
# What drafters reach, for people; `bench` measures. Models of one family; texts that repeat themselves; nobody.
OF_MODELS, OF_REPEATS, ALONE = (5, 10), (1, 3), (1, 1)
ROWS = 64
FEW = (1, 4, 16, 64)


@dataclass(frozen=True)
class Beside:
    """Memory that goes to others than the model and its text: where the computation is, in RAM, to keys of guesses."""

    B: Mapping[str, int] = field(default_factory=dict)
    ram_B: Mapping[str, int] = field(default_factory=dict)
    guesses_B: int = 0


def tokens_per_sweep(models: int, repeats: bool, budget: IntOrAuto) -> tuple[int, int]:
    """From few to many, with so many models that draft and with or without guesses from texts that repeat."""
    low, high = OF_MODELS if models else OF_REPEATS if repeats else ALONE
    return (low, high) if budget == "auto" else (min(low, budget + 1), min(high, budget + 1))


def beside_of(
    folder: Folder, drafters: list[Folder], free: Free, ctx: int, budget: IntOrAuto, drafter_quant: FewBits
) -> Beside:
    """What a sweep and the drafters take, and keys and values of guesses, by the same sums as loading."""

    def widths(of: Folder) -> Widths:
        return widths_of(of.config, item_B(of), cache_B(of.config, 1, item_B(of)))

    free_B = free.ram_B if free.vram_B is None else free.vram_B
    nodes = nodes_of(budget, widths(folder), ctx, free_B)
    drafter_B = embeddings_B = 0
    for one in drafters:
        bits: FewBits = "none" if is_quantised(one) else drafter_quant
        embeddings_B += looked_up_B(one, bits, item_B(one))
        drafter_B += resident_B(one, bits, item_B(one), ctx) + drafting_B(widths(one), ctx, nodes)
    return Beside(
        {**workspace(widths(folder), ctx, nodes), "drafter": drafter_B - embeddings_B},
        {"embeddings of the drafter": embeddings_B},
        guesses_B(widths(folder), ctx, nodes),
    )


@dataclass(frozen=True)
class Row:
    """One combination: where it would live and how long a sweep takes, or the refusal."""

    offload: Offload
    form: Format
    head: FourBits
    need: Need
    work: Work
    placement: Placement | None
    forecast: Forecast | None
    refusal: OffloadError | None
    tokens: tuple[int, int] = OF_MODELS
    """Per sweep, from few to many."""

    @property
    def tokens_per_s(self) -> tuple[float, float] | None:
        """Slow and fast end of what to expect."""
        if self.forecast is None:
            return None
        return self.tokens[0] / self.forecast.sweep_s, self.tokens[1] / self.forecast.sweep_s

    @property
    def moved(self) -> list[Moved]:
        """What sweeps of more and more rows bring, until all experts come ahead; without experts one is like any."""
        if self.placement is None:
            return []
        most = self.work.routing.many
        return [moved(self.placement, self.work, rows) for rows in (*(n for n in FEW if n < most), most)]


def outlook(
    folder: Folder,
    free: Free,
    ceilings: Ceilings,
    item_B: int,
    ctx: int,
    beside: Beside,
    every: bool,
    head: FourBits = "none",
    tokens: tuple[int, int] = OF_MODELS,
) -> list[Row]:
    """All combinations of offload and format, the checkpoint's own format first."""
    rows_each = ROWS if tokens != ALONE else 1
    forms: tuple[Format, ...] = ("none",) if is_quantised(folder) else FORMATS if every else ("none", "nf4")
    rows = []
    free = replace(free, disk_Bps=ceilings.disk_Bps, link_Bps=ceilings.link_Bps)
    for form in forms:
        whole = need_in(folder, form, item_B, ctx, beside.B)
        need = replace(
            with_head(folder, whole, head, item_B),
            guesses_B=beside.guesses_B,
            cache_moves=True,
            beside_ram_B=beside.ram_B,
        )
        work = work_of(folder, form, item_B, head)
        for mode in MODES:
            try:
                placement = place(need, free, mode)
            except OffloadError as refusal:
                rows.append(Row(mode, form, head, need, work, None, None, refusal, tokens))
            else:
                told = forecast(placement, work, ceilings, rows_each)
                rows.append(Row(mode, form, head, need, work, placement, told, None, tokens))
    return rows


def best(rows: list[Row]) -> Row | None:
    """The one to recommend: as stored if it is nearly as fast, since fewer bits are another model."""
    fitting = [row for row in rows if row.forecast is not None]
    if not fitting:
        return None

    def seconds(row: Row) -> float:
        assert row.forecast is not None
        return row.forecast.sweep_s * (1.0 if row.form == "none" else 1.3)

    return min(fitting, key=lambda row: (seconds(row), MODES.index(row.offload)))
