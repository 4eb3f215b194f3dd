"""Every way to run a model here, each with its memory and its speed, or why not. Arithmetic on headers; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cli.shared.options import IntOrAuto
from offload.errors import OffloadError
from offload.machine.memory import Free
from offload.placement.forecast import Ceilings, Forecast, Moved, Work, forecast, moved
from offload.placement.placement import Need, Offload, Placement
from offload.placement.quantized_sizes import FORMATS, Format, FourBits, is_quantised, work_of
from offload.placement.solver import place
from specexec.compose.auto_choice import picked
from specexec.compose.memory_plan import LoadRequest, need_with
from specexec.drafters.registry import DrafterChoice

MODES: tuple[Offload, ...] = ("none", "ram", "disk", "auto")
# What drafters reach, for people; `bench` measures. Models of one family; texts that repeat themselves; no drafter.
OF_MODELS, OF_REPEATS, ALONE = (5, 10), (1, 3), (1, 1)
ROWS = 64
FEW = (1, 4, 16, 64)


def tokens_per_sweep(models: int, repeats: bool, budget: IntOrAuto) -> tuple[int, int]:
    """From few to many, with so many models that draft and with or without guesses from texts that repeat."""
    low, high = OF_MODELS if models else OF_REPEATS if repeats else ALONE
    return (low, high) if budget == "auto" else (min(low, budget + 1), min(high, budget + 1))


@dataclass(frozen=True)
class OutlookRow:
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
    request: LoadRequest, choice: DrafterChoice, free: Free, ceilings: Ceilings, every: bool
) -> list[OutlookRow]:
    """All combinations of offload and format, the checkpoint's own format first, as `load` would place each."""
    folder, head = request.target, request.options.head_quant
    compute = request.options.compute
    likely: tuple[Format, ...] = ("int8", "int4") if compute == "int8" else FORMATS if every else ("none", "nf4")
    forms = ("none",) if is_quantised(folder) else likely
    rows = []
    for form in forms:
        work = work_of(folder, form, request.item_B(folder), head, compute)
        for mode in MODES:
            one = replace(request, form=form, options=replace(request.options, offload=mode))
            rows.append(row_of(one, choice, free, ceilings, work))
    return rows


def row_of(request: LoadRequest, choice: DrafterChoice, free: Free, ceilings: Ceilings, work: Work) -> OutlookRow:
    """One combination, with the drafters that `load` would take for it."""
    chosen, _ = picked(request, choice, free, {})
    models = len(request.drafters if chosen.models else ()) + len((*chosen.copies, *chosen.heads))
    tokens = tokens_per_sweep(models, "ngram" in chosen.sources, request.budget)
    need, options = need_with(request, chosen), request.options
    row = OutlookRow(options.offload, request.form, options.head_quant, need, work, None, None, None, tokens)
    try:
        speeds = replace(free, disk_Bps=ceilings.disk_Bps, link_Bps=ceilings.link_Bps)
        placement = place(need, speeds, options.offload, options.kv)
    except OffloadError as refusal:
        return replace(row, refusal=refusal)
    expected = forecast(placement, work, ceilings, 1 if tokens == ALONE else ROWS)
    return replace(row, placement=placement, forecast=expected)


def best(rows: list[OutlookRow]) -> OutlookRow | None:
    """The one to recommend: as stored if it is nearly as fast, since fewer bits are another model."""
    fitting = [row for row in rows if row.forecast is not None]
    if not fitting:
        return None

    def seconds(row: OutlookRow) -> float:
        assert row.forecast is not None
        return row.forecast.sweep_s * (1.0 if row.form == "none" else 1.3)

    return min(fitting, key=lambda row: (seconds(row), MODES.index(row.offload)))
