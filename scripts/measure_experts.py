"""When is it worth waiting for experts? Each sweep twice, experts once they are chosen and all of them ahead.

The same rows through the same model, streamed from disk, the two ways by turns: how long the one takes over the other,
and the bytes that it brings, beside the part of the experts that so many rows are expected to visit. The margin in
`offload/checkpoint/routing.py` is best where the ratio passes 1. Without FOLDER a
 random mixture is made and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from timing import drop_cache, ratios, spread, timed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import offload
from offload.checkpoint import routing
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.quantize import Quant
from offload.packs.pack import pack, plan
from specexec.model.linears.any_rows import linears

SWEEPS = 3  # in a row, for one value: what was read ahead of the first is read ahead of the next ones too
ALWAYS, NEVER = 1.0, 0.0  # the part of the experts up to which they are fetched on demand


@dataclass
class Way:
    """Seconds and bytes of sweeps that fetch experts on demand up to this part of them, one for each turn."""

    part: float
    seconds: list[float] = field(default_factory=list)
    read_B: list[float] = field(default_factory=list)


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--rows", type=int, multiple=True, help="Rows of a sweep; may be repeated. [default: 1 to 64]")
@click.option("--pairs", default=10, show_default=True, help="Turns for each number of rows.")
@click.option("--experts", default=64, show_default=True, help="Of each layer of the random mixture.")
@click.option("--chosen", default=4, show_default=True, help="Of them for each row.")
@click.option("--layers", default=8, show_default=True)
@click.option("--hidden", default=1024, show_default=True)
@click.option("--quant", type=click.Choice(["none", "int8", "nf4"]), default="none", show_default=True)
@click.option("--link-limit", type=float, help="Bytes a second: as if the disk were so slow.")
@click.option("--threads", default=1, show_default=True, help="Threads of the arithmetic.")
def main(
    folder: Path | None, rows: tuple[int, ...], pairs: int, experts: int, chosen: int, layers: int, hidden: int,
    quant: Quant, link_limit: float | None, threads: int,
) -> None:  # fmt: skip
    """Measure both ways on the mixture in FOLDER, or on a random one."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scrap:
        if folder is None:
            folder = Path(scrap) / "packed"
            _make(Path(scrap) / "mixture", experts, chosen, layers, hidden)
            pack(plan(open_folder(Path(scrap) / "mixture"), quant), folder)
        model = offload.load(folder, "disk", ctx=256, link_limit_Bps=link_limit)
        stream, checked = offload.stream_of(model), open_folder(folder)
        mixture = routing.routing_of(checked.config)
        if mixture is None:
            raise click.UsageError(f"{folder} holds no mixture of experts")
        click.echo(stream.placement.summary)
        click.echo("rows  visited  bytes               seconds on demand    all ahead            demand / ahead")
        for count in rows or (1, 4, 8, 12, 16, 20, 24, 32, 48, 64):
            drop_cache(checked.file_sizes)
            demand, ahead = Way(ALWAYS), Way(NEVER)
            _measure(model, count, pairs, (demand, ahead))
            visited = float(mixture.touched(count)) / mixture.experts
            click.echo(
                f"{count:4}  {visited:7.2f}  {ratios(demand.read_B, ahead.read_B):<18}  {spread(demand.seconds):<19}"
                f"  {spread(ahead.seconds):<19}  {ratios(demand.seconds, ahead.seconds)}"
            )
        stream.close()


def _make(folder: Path, experts: int, chosen: int, layers: int, hidden: int) -> None:
    """A mixture of experts without a tokenizer: rows are token ids, and a row goes where its own token sends it."""
    numbers = {
        "vocab_size": 1024, "hidden_size": hidden, "intermediate_size": hidden, "moe_intermediate_size": hidden // 2,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64, "num_experts": experts, "num_experts_per_tok": chosen, "max_position_embeddings": 2048,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **numbers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)


def _measure(model: PreTrainedModel, rows: int, pairs: int, ways: tuple[Way, ...]) -> None:
    stream = offload.stream_of(model)
    generator = torch.Generator().manual_seed(rows)
    with torch.no_grad():
        for _ in range(pairs):
            tokens = torch.randint(0, model.config.vocab_size, (1, rows), generator=generator)
            for way in ways:
                with _until(way.part):
                    _sweep(model, tokens)  # the first layers of a sweep are read in the way of the one before
                    before_B = stream.stats().bytes_read
                    way.seconds.append(timed(partial(_sweep, model, tokens, SWEEPS)) / SWEEPS)
                    way.read_B.append((stream.stats().bytes_read - before_B) / SWEEPS)


@contextmanager
def _until(part: float) -> Iterator[None]:
    """Experts come on demand up to this part of them."""
    usual, routing.WORTH = routing.WORTH, part
    try:
        yield
    finally:
        routing.WORTH = usual


def _sweep(model: PreTrainedModel, tokens: torch.Tensor, times: int = 1) -> None:
    with linears(model.device, model.dtype, offload.share):
        for _ in range(times):
            model(tokens)


if __name__ == "__main__":
    main()
