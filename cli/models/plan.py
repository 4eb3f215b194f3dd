"""`specexec plan`: what would fit here and how fast, before anything is loaded or downloaded. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from cli.engine.facts import placement_facts
from cli.models.gpu_cards import Card, card, link_of
from cli.shared.conditions import conditions
from cli.shared.control_codes import echo
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import BUDGET, COUNT, DRAFT_BITS, DRAFTS_ON, SIZE, SPEED, IntOrAuto, trust_option
from cli.shared.quantities import exact_size, format_bytes
from cli.shared.verbosity import json_option, verbosity_options
from cli.terminal.table import table
from offload.hub.names import DEMO, known
from specexec.compose.load_options import KV_QUANT, DraftsOn, LoadOptions
from specexec.drafters.registry import check_models, parse
from specexec.model.architecture import context_for

if TYPE_CHECKING:
    from cli.models.outlook import OutlookRow
    from offload.checkpoint.headers import Folder
    from offload.machine.memory import Free
    from offload.placement.forecast import Ceilings
    from offload.placement.placement import KVHome, Placement
    from offload.placement.quantized_sizes import FewBits, FourBits
    from offload.placement.requirements import Compute, KVQuant
    from specexec.drafters.registry import DrafterChoice

# What `chat` does unasked, too.
USUAL: dict[str, int | str | None] = {
    "ctx": None, "budget": "auto", "drafter": "auto", "drafter-device": "auto", "drafter-quant": "none",
    "draft-window": None, "compute": "float", "kv-quant": None, "kv": "ram",
}  # fmt: skip
REACHED = 0.6  # of what is sold


@click.command(cls=SectionedCommand, short_help="Say what fits and how fast it will be, before loading.")
@click.argument("model", default="demo")
@click.option("--gpu", metavar="NAME|SIZE", help="As if this GPU were here, such as 4090 or 12GiB; none is the CPU.")
@click.option("--link", type=SPEED, help="As if the link to the GPU had this speed, such as 12GB/s.")
@click.option("--disk", type=SPEED, help="As if the disk had this speed.")
@click.option("--ram", type=SIZE, help="As if this much RAM were free.")
@click.option("--vram", type=SIZE, help="As if this much GPU memory were free.")
@click.option(
    "--ctx", type=COUNT, show_default="the model's own, at most 8k", help="Context length in tokens, such as 8k."
)
@click.option("-b", "--budget", type=BUDGET, default=USUAL["budget"], help="Guesses per sweep to make room for.")
@click.option(
    "-d", "--drafter", metavar="NAME", default=USUAL["drafter"], help="Drafters to make room for; auto: the paired one."
)
@click.option("--drafter-quant", type=DRAFT_BITS, default=USUAL["drafter-quant"], help="Bits of the drafter's layers.")
@click.option("--drafter-device", type=DRAFTS_ON, default=USUAL["drafter-device"], help="Where drafter models compute.")
@click.option("--draft-window", type=COUNT, show_default="all", help="Last tokens a drafter sees, such as 4k.")
@click.option("--lora", multiple=True, metavar="FOLDER[:SCALE]", help="A LoRA adapter to make room for.")
@click.option("--drafter-lora", multiple=True, metavar="FOLDER[:SCALE]", help="The same of a drafter model.")
@click.option("--head-quant", type=click.Choice(["none", "nf4"]), default="none", help="Bits of the model's head.")
@click.option("--compute", type=click.Choice(["float", "int8"]), default="float", help="How int8 and int4 multiply.")
@click.option("--kv-quant", type=click.Choice(KV_QUANT), show_default="none", help="Bits of keys and values.")
@click.option("--kv", type=click.Choice(["ram", "disk", "auto"]), default="ram", help="Slowest place for them.")
@click.option("--all", "every", is_flag=True, help="Every number format, not only the likely ones.")
@click.option("--offline", is_flag=True, help="Use only what is already on this machine.")
@trust_option
@json_option()
@verbosity_options
def plan(
    model: str, gpu: str | None, link: float | None, disk: float | None, ram: int | None, vram: int | None,
    ctx: int | None, budget: IntOrAuto, drafter: str, drafter_device: DraftsOn, drafter_quant: FewBits,
    head_quant: FourBits, compute: Compute, kv_quant: KVQuant | None, kv: KVHome, draft_window: int | None,
    lora: tuple[str, ...], drafter_lora: tuple[str, ...], every: bool, offline: bool,
    trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say what of MODEL would live where, how long a sweep takes, and the command to type.

    Only config.json and the headers of the weights are read, on the Hub too. Speeds are those that `specexec doctor`
    measured here; where it has not run they are assumed, and labelled so.
    """
    from cli.models.gate import check, only_plainly
    from cli.models.outlook import best, outlook
    from offload.checkpoint.lora import with_adapters
    from offload.hub.headers_only import item_B, list_drafters, list_model
    from specexec.compose.head_folders import fitting, head_kind
    from specexec.compose.memory_plan import LoadRequest

    guests = _counted(drafter)
    folder = with_adapters(list_model(model, offline=offline), lora)
    branches = check(folder, trees=guests.required, ctx=ctx, trust_remote_code=trust_remote_code)
    plainly = "" if branches else only_plainly(folder, trust_remote_code) or ""
    here = _machine(folder, gpu, ram, vram, item_B(folder), compute)
    given = {"link": link, "disk": disk}
    speeds = replace(
        here.ceilings,
        link_Bps=link or here.ceilings.link_Bps,
        disk_Bps=disk or here.ceilings.disk_Bps,
        assumed=tuple(name for name in here.ceilings.assumed if not given.get(name)),
    )
    drafters = [
        one if head_kind(one) else with_adapters(one, drafter_lora)
        for one in list_drafters(model, guests.models, offline=offline)
    ]
    check_models(guests, [one.path for one in drafters], model)
    drafters = [*fitting(guests, folder, drafters)]
    for one in drafters:
        if not head_kind(one):
            check(one, trees=True, trust_remote_code=trust_remote_code)
    longest = folder.config.get("max_position_embeddings")
    context = context_for(ctx, longest if isinstance(longest, int) else 2**31 - 1)
    options = LoadOptions(
        drafter, lora=lora, drafter_lora=drafter_lora, drafter_device=drafter_device, drafter_quant=drafter_quant,
        draft_window=draft_window,
        head_quant=head_quant, compute=compute, kv_quant=kv_quant, kv=kv, budget=budget, ctx=ctx,
    )  # fmt: skip
    request = LoadRequest.of(
        folder, tuple(drafters), options, context, here.free, branches=branches, plainly=plainly, toy=model == DEMO
    )
    rows = outlook(request, guests, here.free, speeds, every)
    chosen = best(rows)
    kept = {"ctx": ctx, "budget": budget, "drafter": drafter, "drafter-device": drafter_device,
            "drafter-quant": drafter_quant, "draft-window": draft_window, "compute": compute,
            "kv-quant": kv_quant, "kv": kv}  # fmt: skip
    adapters = {"lora": lora, "drafter-lora": drafter_lora}
    typed = [] if chosen is None else commands_for(model, chosen, ram, vram, kept, trust_remote_code, adapters)
    answer = _Answer(model, folder, here, speeds, rows, chosen, typed)
    if as_json:
        asked = {"gpu": gpu, "link": link, "disk": disk, "ram": ram, "vram": vram, "ctx": ctx, "budget": budget,
                 "drafter": drafter, "drafter_device": drafter_device,
                 "drafter_quant": drafter_quant, "draft_window": draft_window,
                 "head_quant": head_quant, "compute": compute, "kv_quant": kv_quant, "kv": kv, "lora": lora,
                 "drafter_lora": drafter_lora, "all": every,
                 "offline": offline, "trust_remote_code": trust_remote_code}  # fmt: skip
        echo(json.dumps({"asked": asked} | answer.record(), indent=1))
        return
    for line in answer.page():
        echo(line, folded=True)
    if plainly and guests.auto:
        echo(f"Plain decoding: {plainly.partition(' Try: ')[0]}", folded=True)


def _counted(drafter: str) -> DrafterChoice:
    """Who drafts, as it is typed; only models are counted here."""
    choice = parse(drafter, known)
    if choice.copies:
        raise click.BadParameter(
            "what skip and substitute copy of the model is settled when it is loaded. Name models, ngram, none, auto.",
            param_hint="--drafter",
        )
    return choice


@dataclass(frozen=True)
class _Machine:
    """What computes, what is free and how fast it is; `changed` is why speeds that were measured are not used."""

    words: str
    free: Free
    ceilings: Ceilings
    changed: tuple[str, ...]


def _machine(
    folder: Folder, gpu: str | None, ram: int | None, vram: int | None, item_B: int, compute: Compute
) -> _Machine:
    from offload.hub.headers_only import NAMES
    from offload.machine.gpus import gpus
    from offload.machine.memory import free_memory, margin_B
    from offload.machine.speeds import disk_key, load_speeds
    from offload.placement.forecast import ceilings

    free = free_memory("cpu", ram)
    found = gpus() if gpu is None else []
    name, memory_B, flops, slot = "CPU", vram, None, None
    if gpu and gpu.lower() not in ("none", "cpu"):
        named = _card(gpu)
        name, memory_B = named.name, named.memory_B if vram is None else vram
        flops, slot = named.flops and named.flops * REACHED, named.link
    elif found:
        name, memory_B = found[0].name, found[0].free_B if vram is None else vram
        slot = found[0].link or link_of(name)
    if memory_B is not None:
        free = replace(free, vram_B=memory_B, vram_margin_B=margin_B(memory_B) if vram is None else 0)
    device = "cpu" if memory_B is None else "cuda"
    measured = load_speeds()
    now = conditions(device)
    changed = measured.changed(device, now)
    limits = ceilings(measured.valid_under(device, now), disk_key(folder.weights_at), device, NAMES[item_B], compute)
    if flops:
        limits = replace(limits, arithmetic=replace(limits.arithmetic, flops=flops, curve=()))
    if slot and (gpu or "link" in limits.assumed):  # the link that was measured is another card's, or there is none
        limits = replace(limits, link_Bps=slot.Bps, assumed=tuple(dict.fromkeys([*limits.assumed, "link"])))
    return _Machine(name, free, limits, changed)


def _card(text: str) -> Card:
    try:
        return card(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gpu") from error


@dataclass(frozen=True)
class _Answer:
    """What would fit, and how fast; `typed` are the commands for the best of it."""

    model: str
    folder: Folder
    here: _Machine
    speeds: Ceilings
    rows: list[OutlookRow]
    chosen: OutlookRow | None
    typed: list[str]

    def page(self) -> list[str]:
        """Lines for people."""
        from offload.hub.local_models import bits_per_weight, format_of
        from offload.units import size

        here, speeds, rows, chosen = self.here, self.speeds, self.rows, self.chosen
        weights_B = sum(entry.nbytes for entry in self.folder.entries.values())
        layers, called = len(rows[0].need.layers_B), self.folder.called if self.model != "demo" else "demo"
        form = f"{format_of(self.folder)}, {bits_per_weight(self.folder)} bits each"
        vram = f"{size(here.free.vram_B)} of GPU memory · " if here.free.vram_B is not None else ""
        link = f" · link {format_bytes(speeds.link_Bps)}/s" if here.free.vram_B is not None else ""
        lines = [
            f"{called}: {layers} layers, {size(weights_B)} of weights in {form}",
            f"here: {here.words} · {vram}{size(here.free.ram_B)} of RAM · disk {format_bytes(speeds.disk_Bps)}/s{link}",
            "",
        ]
        heads = ["", "offload", "quant", "GPU", "RAM", "disk", "s/sweep", "bound", "tok/s"]
        cells = [heads, *(_cells(row, row is chosen) for row in rows)]
        if here.free.vram_B is None:
            cells = [[*row[:3], *row[4:]] for row in cells]
        lines += [*table(cells), ""]
        if chosen is None:
            refusal = rows[-1].refusal
            lines.append(f"Nothing fits: {refusal}" if refusal else "Nothing fits.")
        else:
            assert chosen.placement is not None
            lines += [f"Best here: {chosen.placement.summary}", *(f"  {line}" for line in self.typed)]
            lines += [f"  {line}" for line in (*_parts(chosen.placement), *_by_rows(chosen))]
        lines += [f"Note: {note}." for note in self.folder.notes]
        low, high = (chosen or rows[0]).tokens
        many = f"{low} to {high} accepted tokens" if high > low else f"{low} token"
        assumed = f"{many} per sweep{'' if high > low else ': nothing guesses'}"
        lines.append(f"Weights and cache are exact; tok/s assumes {assumed}.")
        if here.changed:
            lines.append(f"Measured arithmetic is not used; it was measured with {'; '.join(here.changed)}.")
        if speeds.assumed:
            lines.append(f"Assumed, not measured: {', '.join(speeds.assumed)}. `specexec doctor` measures them.")
        return lines

    def record(self) -> dict[str, object]:
        """The same for programs."""
        from offload.hub.local_models import bits_per_weight, format_of

        return {
            "model": self.model,
            "weights_B": sum(entry.nbytes for entry in self.folder.entries.values()),
            "format": format_of(self.folder),
            "bits_per_weight": bits_per_weight(self.folder),
            "notes": list(self.folder.notes),
            "tokens_per_sweep": (self.chosen or self.rows[0]).tokens,
            "machine": {"device": self.here.words, "ram_B": self.here.free.ram_B, "vram_B": self.here.free.vram_B},
            "speeds": {
                "disk_Bps": self.speeds.disk_Bps,
                "link_Bps": self.speeds.link_Bps,
                "assumed": list(self.speeds.assumed),
                "changed": list(self.here.changed),
            },
            "best": self.typed or None,
            "rows": [
                (placement_facts(row.placement) if row.placement else {})
                | {
                    "offload": row.offload,
                    "quant": row.form,
                    "fits": row.placement is not None,
                    "refusal": None if row.refusal is None else row.refusal.what,
                    "sweep_s": row.forecast and row.forecast.sweep_s,
                    "bound": row.forecast and row.forecast.bound,
                    "tokens_per_s": row.tokens_per_s,
                    "moved_by_rows": [asdict(one) for one in row.moved],
                }
                for row in self.rows
            ],
        }


def _parts(placement: Placement) -> list[str]:
    """Everything that takes memory, the largest first; interpreter and libraries come on top."""
    from offload.units import size

    sides = {"GPU memory": placement.device_parts_B, "RAM": placement.host_parts_B}
    return [
        f"{side}: " + " · ".join(f"{name} {size(parts_B[name])}" for name in sorted(parts_B, key=lambda n: -parts_B[n]))
        for side, parts_B in sides.items()
        if parts_B
    ]


def _by_rows(row: OutlookRow) -> list[str]:
    """What sweeps of different sizes bring, where that differs: among experts that travel."""
    from offload.units import size

    routing, sizes = row.work.routing, row.moved
    if len(sizes) < 2 or not sizes[-1].disk_B + sizes[-1].link_B:
        return []
    brought = []
    for one in sizes:
        ways = [(one.disk_B, "from disk"), (one.link_B, "over the link")]
        amount = " and ".join(f"{size(nbytes)} {way}" for nbytes, way in ways if nbytes)
        brought.append(f"{amount} for {one.rows} row{'s' if one.rows > 1 else ''}")
    each = f"{routing.chosen} of {routing.experts} for each"
    return [f"Experts come when rows are sent to them, {each}. A sweep brings {', '.join(brought)} or more."]


def commands_for(
    model: str,
    row: OutlookRow,
    ram: int | None,
    vram: int | None,
    kept: Mapping[str, int | str | None],
    code: bool = False,
    adapters: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[str]:
    """What to type for this combination, within the same budgets and with what else was asked for."""
    budgets = "".join(f" --{name} {exact_size(B)}" for name, B in (("ram", ram), ("vram", vram)) if B is not None)
    name, more = shlex.quote(model), budgets + ("" if row.head == "none" else f" --head-quant {row.head}")
    more += "".join(f" --{name} {shlex.quote(str(value))}" for name, value in kept.items() if value != USUAL[name])
    more += "".join(f" --{name} {shlex.quote(one)}" for name, some in adapters.items() for one in some)
    more += " --trust-remote-code" if code else ""
    if row.form != "none":
        packed = f"{model.rstrip('/').rpartition('/')[2]}-{row.form}"
        return [
            f"specexec pack {name} --quant {row.form} --out {shlex.quote(packed)}",
            f"specexec chat -m ./{shlex.quote(packed)} --offload {row.offload}{more}",
        ]
    return [f"specexec chat -m {name} --offload {row.offload}{more}"]


def _cells(row: OutlookRow, is_best: bool) -> list[str]:
    from offload.units import size

    mark = "▸" if is_best else ""
    if row.placement is None or row.forecast is None or row.tokens_per_s is None:
        assert row.refusal is not None
        short = "not enough " + ("GPU memory" if row.refusal.code == "not_enough_vram" else "RAM")
        return [mark, row.offload, row.form, "—", "—", "—", "—", short, "—"]
    placed, low, high = row.placement, *row.tokens_per_s
    return [
        mark, row.offload, row.form, size(placed.device_B or 0), size(placed.host_B), size(placed.disk_B),
        _digits(row.forecast.sweep_s), row.forecast.bound, f"{_digits(low)}–{_digits(high)}",
    ]  # fmt: skip


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
