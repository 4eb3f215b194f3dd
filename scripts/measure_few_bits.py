"""Few bits on a CPU: what rounding costs in quality, and what sweeps and steps take beside one another.

    python scripts/measure_few_bits.py quality                  KL to float32 with activations rounded in several ways
    python scripts/measure_few_bits.py weights                  KL to float32 with weights in each format
    python scripts/measure_few_bits.py linears                  one linear of 8192 x 2048 in every form
    python scripts/measure_few_bits.py sweeps build/1b          packs of a model beside the model in bf16
    python scripts/measure_few_bits.py sweeps build/1b --streamed           the same from the disk, beside plain reads
    python scripts/measure_few_bits.py steps                    passes of SmolLM2 beside transformers' own step

Runs of all rivals take turns, so that whatever else the machine does slows all alike; quoted are medians. `linears` and
`steps` count the seconds of their own thread, which leaves out what other programs take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import real_material
import torch
from timing import SPAN_B, read_plainly
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.arithmetic.group_codes import GroupCodes, in_groups
from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import BLOCK, bitsandbytes, quantise_int8
from offload.checkpoint.quantized.weight import Quantised
from offload.hub.names import demo_folder
from offload.machine.files import Files
from offload.machine.heap import suit
from offload.machine.speeds import reading_for
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.stream.store import Arena
from specexec.model.cache import KVCache
from specexec.model.quick_layers import quicken
from specexec.model.tree_lm import Rows, TreeLM

HERE = Path(__file__).parent.parent
O, I = 8192, 2048

Timer = Callable[[], float]


@click.group()
def main() -> None:
    """Measure few bits on a CPU."""


@main.command()
def quality() -> None:
    """Mean KL to the float32 model, per token, and how often the likeliest token stays."""
    folder = real_material.model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [tokenizer(text)["input_ids"][:600] for text in _texts()]
    whole = _logprobs(model, texts)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.weight.data = RowCodes.of(*quantise_int8(linear.weight.data), torch.float32).dense()
    ways: dict[str, tuple[int, int] | None] = {
        "float32": None, "15 bits by row": (127 * 128, 0), "11 bits by row": (127 * 8, 0), "8 bits by row": (127, 0),
        **{f"8 bits by groups of {size}": (127, size) for size in (32, 64, 192)},
    }  # fmt: skip
    click.echo("| activations | KL | likeliest kept |\n|---|---|---|")
    for name, way in ways.items():
        hooks = [] if way is None else [linear.register_forward_pre_hook(partial(_rounded, way)) for linear in linears]
        found = _logprobs(model, texts)
        for hook in hooks:
            hook.remove()
        click.echo(f"| {name} | {_apart(whole, found)} |")


def _texts() -> list[str]:
    """English prose, all from this repository."""
    return [
        (HERE / "README.md").read_text()[:2500],
        *((HERE / "docs" / name).read_text()[1000:3500] for name in ("streaming.md", "drafters.md", "batch.md")),
    ]


@main.command()
def weights() -> None:
    """Mean KL to the float32 model with the layers' linears in int8, int4 and NF4: the real model's and the demo's."""
    click.echo("| model | weights | KL | likeliest kept |\n|---|---|---|---|")
    for name, folder in (("SmolLM2-135M", real_material.model()), ("demo", demo_folder("target"))):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        texts = [tokenizer(text)["input_ids"][:400] for text in _texts()]
        whole = _logprobs(model, texts)
        linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
        kept = [linear.weight.data for linear in linears]
        for form, rounded in (("int8", _in_int8), ("int4", _in_int4), ("nf4", _in_nf4)):
            for linear, weight in zip(linears, kept, strict=True):
                linear.weight.data = rounded(weight)
            click.echo(f"| {name} | {form} | {_apart(whole, _logprobs(model, texts))} |")


def _in_int8(weight: torch.Tensor) -> torch.Tensor:
    return RowCodes.of(*quantise_int8(weight), torch.float32).dense()


def _in_int4(weight: torch.Tensor) -> torch.Tensor:
    *codes, scales = in_groups(weight)
    return RowCodes.of(GroupCodes(*codes), scales, torch.float32).dense()


def _in_nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bitsandbytes().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    dense: torch.Tensor = bitsandbytes().dequantize_4bit(packed, state)
    return dense


def _apart(whole: list[torch.Tensor], found: list[torch.Tensor]) -> str:
    apart = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(whole, found, strict=True)])
    kept = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(whole, found, strict=True)])
    return f"{apart.mean():.4f} | {kept.float().mean():.3f}"


@torch.no_grad()
def _logprobs(model: nn.Module, texts: Iterable[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]


def _rounded(way: tuple[int, int], _: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The inputs of a linear in whole steps of their largest magnitude, by row or by groups of columns."""
    largest, size = way
    groups = given[0].unflatten(-1, (-1, size or given[0].shape[-1]))
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
    return (((groups / steps).round() * steps).flatten(-2),)


@main.command()
@click.option("--turns", default=9, show_default=True)
def linears(turns: int) -> None:
    """One linear over some numbers of rows, one thread: bf16, int8 and NF4 dequantised first, integers."""
    torch.set_num_threads(1)
    suit(16)
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = quantise_int8(weight)
    packed, state = bitsandbytes().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    forms = {
        "int8": {"codes": codes, "scales": scales},
        "nf4": {"codes": packed.reshape(-1), "absmax": state.absmax},
    }
    scratch = torch.empty_like(weight)
    in_integers = RowCodes.of(codes, scales, weight.dtype)
    *grouped, peaks = in_groups(weight)
    in_int4 = RowCodes.of(GroupCodes(*grouped), peaks, weight.dtype)

    def dequantised(form: str) -> None:
        dequantise(Quantised("x", form, (O, I), {}, "BF16", BLOCK), forms[form], scratch)

    def after(form: str, rows: torch.Tensor) -> None:
        dequantised(form)
        nn.functional.linear(rows, scratch)

    click.echo(
        "| rows | bf16 | int8 first | NF4 first | int8 in integers | int4 in integers |\n|---|---|---|---|---|---|"
    )
    alone = _turns({form: partial(dequantised, form) for form in forms}, turns, time.thread_time)
    for count in (1, 16, 64, 256):
        rows = torch.randn(count, I).bfloat16()
        tiles = nn.functional.pad(rows, (0, 0, 0, max(16 - count, 0)))
        ways: dict[str, Callable[[], object]] = {
            "bf16": partial(nn.functional.linear, tiles, weight),
            **{form: partial(after, form, tiles) for form in forms},
            "integers": partial(nn.functional.linear, rows, in_integers),
            "int4": partial(nn.functional.linear, rows, in_int4),
        }
        found_ms = _turns(ways, turns, time.thread_time)
        click.echo(f"| {count} | " + " | ".join(f"{found_ms[name]:.1f}" for name in ways) + " |")
    click.echo(f"\ndequantised alone: int8 {alone['int8']:.1f} ms, NF4 {alone['nf4']:.1f} ms")


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default="1,16,64", show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--streamed", is_flag=True, help="Read all layers from the disk for every sweep.")
def sweeps(folder: Path, rows: str, turns: int, threads: int, streamed: bool) -> None:
    """Sweeps of a model: in bf16, as an NF4 and an int8 pack dequantised, as int8 and int4 in integers."""
    torch.set_num_threads(threads)
    where: Offload = "disk" if streamed else "none"
    with TemporaryDirectory(dir=folder.parent) as temporary:
        packs = {quant: Path(temporary) / quant for quant in ("int8", "int4", "nf4")}
        for quant, out in packs.items():
            pack(plan(open_folder(folder), quant), out)  # type: ignore[arg-type]  # three of the four there are
        lms = {
            "bf16": TreeLM(offload.load(folder, where, dtype=torch.bfloat16)),
            "int8": TreeLM(offload.load(packs["int8"], where, dtype=torch.bfloat16)),
            "nf4": TreeLM(offload.load(packs["nf4"], where, dtype=torch.bfloat16)),
            **{
                f"{quant} in integers": TreeLM(
                    offload.load(packs[quant], where, dtype=torch.bfloat16, compute="int8"), tiled=False
                )
                for quant in ("int8", "int4")
            },
        }
        click.echo(f"| rows | {' | '.join(lms)} |\n|---|{'---|' * len(lms)}")
        reads = {name: _reading(packs.get(name.split()[0], folder), lm) for name, lm in lms.items()} if streamed else {}
        for count in map(int, rows.split(",")):
            ways = {name: partial(_sweep, lm, KVCache(), count) for name, lm in lms.items()}
            found_ms = _turns(
                {**ways, **{f"read {name}": read for name, read in reads.items()}}, turns, time.perf_counter
            )
            click.echo(f"| {count} | " + " | ".join(f"{found_ms[name]:.0f}" for name in ways) + " |")
            if reads:
                over = [found_ms[name] / found_ms[f"read {name}"] for name in ways]
                click.echo("| over reads alone | " + " | ".join(f"{ratio:.2f}" for ratio in over) + " |")


@main.command()
@click.option("--turns", default=15, show_default=True)
@click.option("--past", default=200, show_default=True, help="Tokens before the step.")
def steps(turns: int, past: int) -> None:
    """One new token: our sweep and its head beside transformers' own step; 16 rows; a drafter pass over 16 nodes."""
    torch.set_num_threads(1)
    folder = real_material.model()
    text = [token % 1000 for token in range(past)]
    click.echo("| dtype | transformers' step | one row | 16 rows | drafter, 16 nodes |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad():
            before = theirs(torch.tensor([text]), use_cache=True).past_key_values

        def step(theirs: nn.Module = theirs, before: object = before) -> None:
            with torch.no_grad():
                theirs(torch.tensor([[1]]), past_key_values=before, use_cache=True)
            before.crop(-1)  # type: ignore[attr-defined]  # a DynamicCache, which takes back that token

        target = TreeLM(offload.load(folder, "none", dtype=dtype, ctx=past + 64))
        drafting = offload.load(folder, "none", dtype=dtype, ctx=past + 64, reorder=True)
        quicken(drafting)
        drafter = TreeLM(drafting, drafts=True)
        caches = {lm: KVCache() for lm in (target, drafter)}
        for lm, cache in caches.items():
            lm.forward([Rows.text(cache, text)])
            cache.commit(range(past))
        ways: dict[str, Callable[[], object]] = {
            "theirs": step,
            "one": partial(_sweep, target, caches[target], 1),
            "wide": partial(_sweep, target, caches[target], 16),
            "draft": partial(_sweep, drafter, caches[drafter], 16, 16),
        }
        whole_ms = _turns(ways, turns, time.thread_time)
        cells = [f"{took_ms:.1f} ms ({took_ms / whole_ms['theirs']:.2f})" for took_ms in whole_ms.values()]
        click.echo(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")


def _reading(folder: Path, lm: TreeLM) -> Callable[[], None]:
    """The bytes of a sweep read plainly, in the way in which they are streamed."""
    checked = open_folder(folder)
    files, arena = Files(checked.file_sizes, reading_for(checked.weights_at)), Arena(SPAN_B)
    arena.flat.fill_(1)  # the first touch of memory is not the disk's
    wanted_B = offload.stream_of(lm.model).bytes_per_sweep
    return partial(read_plainly, files, arena, checked.file_sizes, wanted_B)


def _sweep(lm: TreeLM, cache: KVCache, rows: int, logits: int = 1) -> None:
    """A chain of so many rows below the text, and the logits of its last ones."""
    (hidden,) = lm.forward([Rows(cache, [token % lm.vocabulary for token in range(rows)], range(-1, rows - 1))])
    lm.head(hidden[-logits:])
    cache.forget_nodes()


def _turns(ways: Mapping[str, Callable[[], object]], turns: int, clock: Timer) -> dict[str, float]:
    """Medians in milliseconds; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            began_s = clock()
            run()
            if turn:
                found[name].append(1e3 * (clock() - began_s))
    return {name: median(times) for name, times in found.items()}


if __name__ == "__main__":
    main()
