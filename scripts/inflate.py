"""Turn a small Llama checkpoint into one of any larger Llama shape that computes the same function.

Real shapes, real bytes and real arithmetic, with text and acceptance that can be checked against the small model.
Such a checkpoint is for measuring machines; it never counts as model quality, and its config.json says so.
Knows nothing of how weights are streamed; packs are written by the package.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from inflation import SHAPES, Inflation, Planned, Shape, Source, misfits
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, read_config
from offload.checkpoint.quantized.quantize import Quant
from offload.errors import OffloadError
from offload.packs.pack import pack, plan

DEMO = Path(__file__).parent.parent / "offload" / "demo" / "target"
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def read_source(folder: Path) -> Source:
    """Read a Llama checkpoint, or say why it cannot be inflated."""
    config = AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters.get("rope_type", "default") if config.model_type == "llama" else "default"
    unfit = [
        (config.model_type != "llama", f"is a {config.model_type} model"),
        (bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)), "has biases"),
        (rope != "default", f"has rope type {rope}"),
    ]
    for reason in (text for is_unfit, text in unfit if is_unfit):
        raise click.ClickException(f"{folder} {reason}; inflate knows Llama with plain rope and no biases")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ff=config.intermediate_size,
        tied=config.tie_word_embeddings,
    )
    return Source(config.to_dict(), shape, model.state_dict())


def into_shards(tensors: list[Planned], shard_B: int, itemsize: int) -> list[list[Planned]]:
    """Whole tensors in order, a new shard before the one that would exceed `shard_B`."""
    shards: list[list[Planned]] = [[]]
    used_B = 0
    for tensor in tensors:
        size_B = tensor.nbytes(itemsize)
        if shards[-1] and used_B + size_B > shard_B:
            shards.append([])
            used_B = 0
        shards[-1].append(tensor)
        used_B += size_B
    return shards


def write_shard(path: Path, tensors: list[Planned], dtype: torch.dtype, advance: Callable[[int], object]) -> None:
    """One safetensors file, written tensor by tensor: only one is ever in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "inflated": "true"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes(dtype.itemsize)
        code = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with ExitStack() as cleanup, partial.open("wb") as file:
        cleanup.callback(partial.unlink, missing_ok=True)
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            made = tensor.make().to(dtype)
            assert made.shape == torch.Size(tensor.size), f"{tensor.name}: planned {tensor.size}, made {made.shape}"
            file.write(made.contiguous().view(torch.uint8).numpy().data)
            advance(tensor.nbytes(dtype.itemsize))
        file.flush()
        partial.replace(path)


def config_of(source: Source, big: Shape, tied: bool, dtype: str) -> dict[str, object]:
    """The small model's config with the big shape, and a label that no report can miss."""
    eps = source.config["rms_norm_eps"]
    assert isinstance(eps, float)
    changed = {
        "hidden_size": big.hidden,
        "num_hidden_layers": big.layers,
        "num_attention_heads": big.heads,
        "num_key_value_heads": big.kv_heads,
        "head_dim": big.head_dim,
        "intermediate_size": big.ff,
        "rms_norm_eps": eps * source.shape.hidden / big.hidden,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "inflated_from": f"hidden {source.shape.hidden}, {source.shape.layers} layers: the same function",
    }
    return {**source.config, **changed}


def inflate(source_dir: Path, out: Path, big: Shape, *, f32: bool, shard_B: int, seed: int) -> int:
    """Write the inflated checkpoint into the empty folder `out`; returns its weights' size in bytes."""
    source = read_source(source_dir)
    if reasons := misfits(source.shape, big):
        raise click.ClickException(f"the source does not fit: {'; '.join(reasons)}")
    dtype = torch.float32 if f32 else torch.bfloat16
    tied = big.tied and source.shape.tied
    tensors = list(Inflation(source, big, seed).tensors(tied))
    total_B = sum(tensor.nbytes(dtype.itemsize) for tensor in tensors)
    out.mkdir(parents=True, exist_ok=True)
    free_B = shutil.disk_usage(out).free
    if total_B + 2**20 > free_B:
        need, have = total_B / 2**30, free_B / 2**30
        raise click.ClickException(f"needs {need:.1f} GiB but {out} has {have:.1f} GiB free; try another --out or bf16")
    if any(out.iterdir()):
        raise click.ClickException(f"{out} is not empty; choose another folder or empty it first")
    shards = into_shards(tensors, shard_B, dtype.itemsize)
    placed: dict[str, str] = {}
    with tqdm(total=total_B, unit="B", unit_scale=True, desc="inflate") as bar:
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            name = many if len(shards) > 1 else "model.safetensors"
            write_shard(out / name, shard, dtype, bar.update)
            placed |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_B}, "weight_map": placed}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    copy_settings(source_dir, out, config_of(source, big, tied, "float32" if f32 else "bfloat16"))
    return total_B


@dataclass(frozen=True)
class Made:
    """Weights for a pack that are made when their turn comes, and never lie anywhere in 16 bits."""

    planned: dict[str, Planned]
    commit: str = "made"

    def load(self, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        """One tensor."""
        return self.planned[entry.name].make().to(dtype).contiguous()


def inflate_packed(source_dir: Path, out: Path, big: Shape, quant: Quant, device: str, seed: int) -> int:
    """Write a pack of the inflated checkpoint, layer by layer; returns its size in bytes."""
    source = read_source(source_dir)
    if reasons := misfits(source.shape, big):
        raise click.ClickException(f"the source does not fit: {'; '.join(reasons)}")
    tied = big.tied and source.shape.tied
    planned = {tensor.name: tensor for tensor in Inflation(source, big, seed).tensors(tied)}
    with TemporaryDirectory() as staging:
        copy_settings(source_dir, Path(staging), config_of(source, big, tied, "bfloat16"))
        entries = {
            name: Entry(name, Path(staging) / "made", 0, tensor.nbytes(2), "BF16", tensor.size)
            for name, tensor in planned.items()
        }
        wanted = plan(Folder(Path(staging), read_config(Path(staging)), entries, {}), quant)
        with tqdm(total=wanted.read_B, unit="B", unit_scale=True, desc="inflate") as bar:
            pack(wanted, out, device, bar.update, Made(planned))
    return wanted.size_B


def copy_settings(source_dir: Path, out: Path, config: dict[str, object]) -> None:
    """Tokenizer and config. The config last: a folder without it is unfinished, and no loader takes it for a model."""
    for path in source_dir.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def size_B(text: str) -> int:
    """`5GB`, `512MiB` or a plain number of bytes."""
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    try:
        value = int(float(text.removesuffix(unit)) * UNITS.get(unit, 1))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a size such as 5GB or 512MiB") from None
    if value <= 0:
        raise click.BadParameter(f"{text!r} must be above zero")
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--shape", type=click.Choice(list(SHAPES)), help="A Llama to imitate; single numbers below override it.")
@click.option(
    "--source", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Small Llama [default: demo]."
)
@click.option("--hidden", type=int, help="Width of the residual stream.")
@click.option("--layers", type=int)
@click.option("--heads", type=int, help="Query heads.")
@click.option("--kv-heads", type=int)
@click.option("--head-dim", type=int, help="A multiple of the source's.")
@click.option("--ff", type=int, help="Width of the MLP.")
@click.option("--dtype", type=click.Choice(["bf16", "f32"]), default="bf16")
@click.option("--shard-size", default="5GB", help="Largest weight file; a single larger tensor gets a file of its own.")
@click.option("--seed", default=0, help="For the weights that have no effect.")
@click.option("--quant", type=click.Choice(["int8", "nf4"]), help="Write a specexec pack, never the 16-bit weights.")
@click.option("--device", default="cpu", help="Where nf4 is computed.")
def main(
    out: Path,
    shape: str | None,
    source: Path | None,
    hidden: int | None,
    layers: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    ff: int | None,
    dtype: str,
    shard_size: str,
    seed: int,
    quant: Quant | None,
    device: str,
) -> None:
    """Write to OUT a checkpoint of any Llama shape that computes the same function as a small one.

    \b
    inflate.py /tmp/fake-1b --shape 1b               2.0 GB, like Llama-3.2-1B
    inflate.py /tmp/fake-8b --shape 8b               14 GB
    inflate.py /tmp/packed-8b --shape 8b --quant nf4 a pack of 3.9 GB
    inflate.py /tmp/wide --hidden 1024 --heads 16 --kv-heads 4 --head-dim 64 --layers 8 --ff 4096 --dtype f32

    Zeros pad the residual stream, and everything else that has no effect is random. Logits agree in float32; in bf16
    rounding may differ unless the new width is the old one times a power of 4. The vocabulary stays the source's.
    """
    shard_B = size_B(shard_size)
    given = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "ff": ff}
    numbers = {name: value for name, value in given.items() if value is not None}
    if shape is None and (missing := sorted(set(given) - set(numbers))):
        raise click.UsageError(
            f"without --shape these are needed too: {', '.join(name.replace('_', '-') for name in missing)}"
        )
    base = SHAPES[shape] if shape else Shape(0, 0, 0, 0, 0, 0, tied=True)
    big = Shape(**({**vars(base), **numbers}))
    if (smallest := min(numbers.values(), default=1)) < 1:
        raise click.UsageError(f"{smallest} is not a size; all numbers must be at least 1")
    if quant and dtype == "f32":
        raise click.UsageError("--quant makes bf16 weights small; it has no f32")
    try:
        if quant:
            written_B = inflate_packed(source or DEMO, out, big, quant, device, seed)
        else:
            written_B = inflate(source or DEMO, out, big, f32=dtype == "f32", shard_B=shard_B, seed=seed)
    except OffloadError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {written_B / 1e9:.2f} GB, {big.layers} layers of width {big.hidden} (inflated)", err=True)


if __name__ == "__main__":
    main()
