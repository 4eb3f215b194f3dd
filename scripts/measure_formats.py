"""Sweeps and loading of the 1b shape in formats that other programs write: fp8, AWQ and GGUF's Q4_K.

The codes are random and the scales small: what is measured is reading, dequantising and multiplying. Each is streamed
from the disk beside two floors, taken in turn: a plain read of the same bytes, and the same sweep with every layer
resident. Loading is the time until every layer of the GGUF file is resident, over a plain read of the file; in a
process that has loaded a model before, so that imports are not counted.

    python scripts/measure_formats.py --out build/formats            # makes the files (2.6 GB), then measures
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import click
import gguf
import numpy as np
import real_material
import torch
from bench_stream import measure
from inflation import SHAPES
from safetensors.torch import save_file
from sparse_model import linears_of
from timing import SPAN_B, TILE, drop_cache, ratios, read_plainly, spread, timed
from tqdm import tqdm

import offload
from offload.checkpoint.contents import SINGLE
from offload.checkpoint.headers import open_folder
from offload.machine.files import Files
from offload.measure import probe_disk
from offload.stream.store import Arena

SHAPE = SHAPES["1b"]
GROUP, BLOCK = 128, 128
Tensors = dict[str, torch.Tensor]


def matrices() -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear of the layers."""
    for layer in range(SHAPE.layers):
        for name, (outputs, inputs) in linears_of(SHAPE).items():
            yield f"model.layers.{layer}.{name}", outputs, inputs


def config() -> dict[str, object]:
    """Of a Llama of the shape, with SmolLM2's vocabulary."""
    small = json.loads((real_material.model() / "config.json").read_text())
    rows: dict[str, object] = {
        "hidden_size": SHAPE.hidden, "num_hidden_layers": SHAPE.layers, "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim, "intermediate_size": SHAPE.ff,
    }  # fmt: skip
    return {**small, **rows, "tie_word_embeddings": True, "dtype": "bfloat16"}


def fp8(name: str, outputs: int, inputs: int, chance: torch.Generator) -> Tensors:
    """Blocks of 128 x 128, as official Qwen and DeepSeek checkpoints have them."""
    codes = torch.randint(0, 0x70, (outputs, inputs), dtype=torch.uint8, generator=chance)
    scales = torch.full((outputs // BLOCK, inputs // BLOCK), 1e-4)
    return {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}


def awq(name: str, outputs: int, inputs: int, chance: torch.Generator) -> Tensors:
    """The layout gemm in groups of 128."""
    shapes = {"qweight": (inputs, outputs // 8), "qzeros": (inputs // GROUP, outputs // 8)}
    words = {
        f"{name}.{role}": torch.randint(-(2**31), 2**31, size, generator=chance).int() for role, size in shapes.items()
    }
    return {**words, f"{name}.scales": torch.full((inputs // GROUP, outputs), 1e-3).half()}


FOLDERS: dict[str, tuple[dict[str, object], Callable[[str, int, int, torch.Generator], Tensors]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, fp8),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}


def make_folder(kind: str, folder: Path) -> Path:
    """A checkpoint of the shape in one of FOLDERS."""
    about, store = FOLDERS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    settings, chance = config(), torch.Generator().manual_seed(0)
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.randn(int(str(settings["vocab_size"])), SHAPE.hidden).bfloat16(),
        "model.norm.weight": torch.ones(SHAPE.hidden).bfloat16(),
    }
    for layer in range(SHAPE.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(SHAPE.hidden).bfloat16()
    for name, outputs, inputs in tqdm([*matrices()], desc=kind):
        tensors |= store(name, outputs, inputs, chance)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": about}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((real_material.model() / file).read_bytes())
    return folder


def make_gguf(file: Path) -> Path:
    """The shape in Q4_K, with SmolLM2's own header for the rest."""
    file.parent.mkdir(parents=True, exist_ok=True)
    small, settings = gguf.GGUFReader(real_material.gguf()), config()
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in small.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_block_count(SHAPE.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_feed_forward_length(SHAPE.ff)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    chance = np.random.default_rng(0)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.layers)

    def add(name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
        found = table.get_name(name, (".weight",))
        assert found
        writer.add_tensor(found, values, raw_dtype=kind)

    def blocks(rows: int, columns: int) -> np.ndarray:
        found = chance.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
        found[:, :, :4] = np.array([1e-5, 1e-5], dtype=np.float16).view(np.uint8)
        return found.reshape(rows, -1)

    q4_k, f32 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.F32
    add("model.embed_tokens.weight", blocks(int(str(settings["vocab_size"])), SHAPE.hidden), q4_k)
    add("model.norm.weight", np.ones(SHAPE.hidden, dtype=np.float32), f32)
    for layer in range(SHAPE.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{layer}.{norm}.weight", np.ones(SHAPE.hidden, dtype=np.float32), f32)
    for name, outputs, inputs in tqdm([*matrices()], desc="q4_k"):
        add(f"{name}.weight", blocks(outputs, inputs), q4_k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the files are, or are made.")
@click.option("--rows", default=TILE, show_default=True, help="Tokens of a sweep.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of the arithmetic.")
@click.option("--only", type=click.Choice([*FOLDERS, "q4_k"]), multiple=True)
def main(out: Path, rows: int, rounds: int, threads: int, only: tuple[str, ...]) -> None:
    """Measure the three formats, and loading the GGUF file."""
    torch.set_num_threads(threads)
    for kind in only or (*FOLDERS, "q4_k"):
        path = out / "q4_k.gguf" if kind == "q4_k" else out / kind
        if not path.exists():
            path = make_gguf(path) if kind == "q4_k" else make_folder(kind, path)
        checked = open_folder(path)
        disk = probe_disk(max(checked.file_sizes, key=lambda file: checked.file_sizes[file]))
        streamed, resident = (offload.load(path, tier, ctx=2048) for tier in ("disk", "none"))
        found = measure(streamed, resident, [], checked, disk, rows, rounds, 0)
        click.echo(
            f"{kind:5} sweep {spread(found.sweep)} s, plain read {spread(found.disk)} s, resident "
            f"{spread(found.compute)} s; sweep / larger of both {ratios(found.sweep, found.floor)}"
        )
        if found.both:
            click.echo(f"{'':5} both at once {spread(found.both)} s; sweep / both {ratios(found.sweep, found.both)}")
        offload.stream_of(streamed).close()
        del streamed, resident
        if kind == "q4_k":
            loading, plain = _loading(path, rounds)
            click.echo(f"{'':5} loading {spread(loading)} s, plain read {spread(plain)} s: {ratios(loading, plain)}")


def _loading(path: Path, rounds: int) -> tuple[list[float], list[float]]:
    sizes = open_folder(path).file_sizes
    disk = probe_disk(path)
    plain, arena = Files(sizes, disk.reading), Arena(SPAN_B)
    arena.flat.fill_(1)
    loading: list[float] = []
    reading: list[float] = []
    for _ in range(rounds):
        drop_cache(sizes)
        reading.append(timed(lambda: read_plainly(plain, arena, sizes, sum(sizes.values()))))
        drop_cache(sizes)
        loading.append(timed(lambda: offload.load(path, "none", ctx=2048)))
    plain.close()
    return loading, reading


if __name__ == "__main__":
    main()
