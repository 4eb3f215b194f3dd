"""A tiny model in every format that weights are read in, and what works with it: the table of docs/quantized.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import offload
import specexec
from offload.checkpoint.contents import SINGLE
from offload.checkpoint.documents import Json
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.quantize import CONFIGS, Quant, quantise
from offload.errors import OffloadError
from offload.packs.pack import pack, plan
from tests.gguf_files import Kind, dense_of, write_gguf
from tests.quantised_files import Stored, add_tokenizer, dense, folder, rewrite, set_config
from tests.test_quantised_formats import FORMATS, words
from tests.tiny import greedy, logits_of, tiny

RECORDED = Path(__file__).parent / "recorded"
PROMPT = torch.arange(2, 32)[None]
WRITTEN = 12
Made = tuple[Path, PreTrainedModel]


def stored(config: Json, store: Callable[[str, torch.Tensor], Stored]) -> Callable[..., Made]:
    """What makes a llama whose linears are stored so, and transformers' model of its dequantised weights."""

    def make(path: Path, **sizes: Any) -> Made:
        model = tiny("llama", path, **sizes)
        rewrite(path, config, store)
        add_tokenizer(path)
        with torch.no_grad():
            for name, weight in dense(path).items():
                model.get_parameter(name).copy_(weight)
        return path, model

    return make


def ours(quant: Quant) -> Callable[..., Made]:
    """The same in a format that packs are made in."""
    config = CONFIGS.get(quant, {"quant_method": "specexec"})
    return stored(config, lambda name, weight: quantise(weight, f"{name}.weight", quant))


def fp8(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    grid = torch.rand(-(-O // 16), -(-I // 32), generator=torch.Generator().manual_seed(0))
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": grid + 0.5}


def mxfp4(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    powers = torch.full((O, I // 32), 121, dtype=torch.uint8)
    return {f"{name}.weight_packed": words(O, I // 8).view(torch.uint8), f"{name}.weight_scale": powers}


def mxfp8(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    powers = torch.full((O, I // 32), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    codes = (16 * weight).to(torch.float8_e4m3fn)
    return {f"{name}._weight_qdata": codes, f"{name}._weight_scale": powers}


def of_gpt_oss(path: Path, **sizes: Any) -> Made:
    """A gpt-oss whose experts are stored as the published ones are."""
    model = tiny("gpt_oss", path, **({"intermediate_size": 128} | sizes))
    tensors = load_file(path / SINGLE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = words(experts, outputs, inputs // 32, 4).view(torch.uint8)
        powers = torch.full((experts, outputs, inputs // 32), 121, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": powers}
        with torch.no_grad():
            model.get_parameter(name).copy_(convert_moe_packed_tensors(codes, powers, dtype=torch.float32))
    save_file(tensors, path / SINGLE, {"format": "pt"})
    set_config(path, {"quant_method": "mxfp4"})
    add_tokenizer(path)
    return path, model


def in_gguf(path: Path, **sizes: Any) -> Made:
    """A GGUF file in Q8_0."""
    model = tiny("llama", path / "dense", **sizes)
    return write_gguf(model, path / "tiny.gguf", Kind.Q8_0), dense_of(model, Kind.Q8_0)


@dataclass(frozen=True)
class Row:
    """A format in the table: what config.json calls it, the tensors of a weight X, and what it was checked against."""

    method: str
    tensors: str
    make: Callable[..., Made]
    """A tiny llama in the format, below a folder, and the model that it must be."""
    recorded: tuple[str, ...] = ()
    """How the files of tests/recorded begin that hold such weights, and what their package makes of them."""
    others: str = ""
    """Other truths, in words; {package} is the version that is installed."""


CT: Mapping[str, Json] = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
ROWS: Mapping[str, Row] = {
    "NF4, FP4": Row(
        "`bitsandbytes`", "`X`, `X.absmax`, `X.quant_state.…`", ours("nf4"), others="bitsandbytes {bitsandbytes}"
    ),
    "int8 by rows": Row("`bitsandbytes`", "`X.weight`, `X.SCB`", ours("int8"), others="bitsandbytes {bitsandbytes}"),
    "[int4](packs.md#weights-in-few-bits) of our packs": Row(
        "`specexec`",
        "`X.weight`, `X.int4_scales`, `X.int4_steps`, `X.int4_origins`",
        ours("int4"),
        others="the same integers in int8; transformers {transformers} with the dequantised weights",
    ),
    "MXFP4 of gpt-oss": Row("`mxfp4`", "`X_blocks`, `X_scales`", of_gpt_oss, others="transformers {transformers}"),
    "[GGUF](gguf.md)": Row(
        "", "blocks", in_gguf, others="gguf-py {gguf}; the words that llama.cpp writes, by a script"
    ),
    "fp8: scales by block, row or tensor": Row(
        "`fp8`, `fbgemm_fp8`, `compressed-tensors`, `modelopt`",
        "`X.weight` (F8), `X.weight_scale_inv` or `X.weight_scale`, `X.weight_g_idx`",
        stored({"quant_method": "fp8", "weight_block_size": [16, 32]}, fp8),
        ("ct_fp8",),
        "transformers {transformers}'s dequantised model of the same file in float32 (blocks, tensors, experts); "
        "blocks that are cut off by a plain loop, since transformers takes another block there",
    ),
    "integers of 1 to 8 bits": Row(
        "`compressed-tensors` (pack-quantized, int-quantized)",
        "`X.weight_packed` or `X.weight` (I8), `X.weight_scale`, `X.weight_zero_point`, `X.weight_g_idx`",
        stored(*FORMATS["compressed-tensors"]),
        ("ct_int",),
    ),
    "NVFP4": Row(
        "`compressed-tensors`, `modelopt` (also by `hf_quant_config.json`)",
        "`X.weight_packed` or `X.weight` (U8), `X.weight_scale`, `X.weight_global_scale` or `X.weight_scale_2`",
        stored(*FORMATS["modelopt"]),
        ("ct_nvfp4", "modelopt_nvfp4"),
    ),
    "MXFP4 by rows": Row(
        "`compressed-tensors`, `modelopt`",
        "`X.weight_packed` or `X.weight`, `X.weight_scale` (U8)",
        stored(dict(CT), mxfp4),
        others="a plain loop",
    ),
    "AWQ, layout gemm, 4 bits": Row("`awq`", "`X.qweight`, `X.qzeros`, `X.scales`", stored(*FORMATS["awq"]), ("awq",)),
    "GPTQ in 2, 3, 4, 8 bits, v1 and v2": Row(
        "`gptq`", "`X.qweight`, `X.qzeros`, `X.scales`, `X.g_idx`", stored(*FORMATS["gptq"]), ("gptq",)
    ),
    "MLX in 2, 3, 4, 5, 6, 8 bits (llama, mistral, qwen2, qwen3)": Row(
        "`quantization` in config.json", "`X.weight` (U32), `X.scales`, `X.biases`", stored(*FORMATS["mlx"]), ("mlx",)
    ),
    "torchao in 8 bits: integers of 1 to 8 bits a byte, floats": Row(
        "`torchao` (its Int8, Intx and Float8 configs)",
        "`X._weight_qdata`, `X._weight_scale`, `X._weight_zero_point`",
        stored(*FORMATS["torchao"]),
        ("torchao_int8", "torchao_intx", "torchao_fp8"),
    ),
    "torchao's Int4Tensor, with scales of AWQ or without": Row(
        "`torchao` (its Int4WeightOnly and Float8DynamicActivationInt4Weight configs, layout plain)",
        "`X._weight_qdata`, `X._weight_scale`, `X._weight_zero_point`, `X._weight_act_pre_scale`",
        stored(*FORMATS["torchao_int4"]),
        ("torchao_int4",),
    ),
    "MXFP8, MXFP4 and NVFP4 of torchao, scales in rows or in the tiles of its kernels": Row(
        "`torchao` (its MX and NVFP4 configs)",
        "`X._weight_qdata`, `X._weight_scale`, `X._weight_per_tensor_scale`",
        stored({"quant_method": "torchao"}, mxfp8),
        ("torchao_mx", "torchao_nvfp4"),
    ),
    "HQQ in 1, 2, 3, 4, 8 bits, groups along either side": Row(
        "`hqq`",
        "`X.W_q`, `X.scale`, `X.zero`, `X.shape`, `X.nbits`, `X.axis`",
        stored(*FORMATS["hqq"]),
        ("hqq",),
    ),
}


@dataclass(frozen=True)
class Found:
    """What works with a format: `yes`, or what was said or seen instead."""

    read: str
    packed: str
    drafted: str
    checked: str


def tried(title: str, workplace: Path) -> Found:
    """Read, pack and draft with a tiny model in the format; compare recorded weights with what their package says."""
    row = ROWS[title]
    path, truth = row.make(workplace / "made")
    expected = logits_of(truth, PROMPT)

    def reads(path: Path) -> bool:
        found = [logits_of(offload.load(path, tier, dtype="f32"), PROMPT) for tier in ("none", "ram", "disk")]
        return all(torch.equal(one, expected) for one in found)

    def packs() -> bool:
        pack(plan(open_folder(path), "none"), workplace / "pack")
        return reads(workplace / "pack")

    return Found(
        _said(lambda: reads(path)),
        _said(packs),
        _said(lambda: _drafts(path, truth)),
        checked(row, workplace),
    )


def _said(works: Callable[[], bool]) -> str:
    try:
        return "yes" if works() else "other values"
    except OffloadError as refusal:
        return f"refused: {refusal.what}"


def _drafts(path: Path, truth: PreTrainedModel) -> bool:
    """Whether a target of the same weights takes most guesses, and writes transformers' text."""
    sampling = specexec.SamplingParams(temperature=0.0, max_tokens=WRITTEN, ignore_eos=True)
    with specexec.load(str(path), drafter=str(path), offload="none", dtype="f32", budget=12) as engine:
        asked = engine.encode("w5 w9 w2")
        done = engine.generate(asked, sampling)
    expected = greedy(truth, torch.tensor([asked]), WRITTEN)[0, len(asked) :].tolist()
    return list(done.tokens) == expected and done.sweeps <= WRITTEN // 2


def checked(row: Row, workplace: Path) -> str:
    """Which packages gave the recorded weights that are read bit for bit, and the other truths."""
    made_by: dict[str, int] = {}
    for file in sorted(file for start in row.recorded for file in RECORDED.glob(f"{start}*.safetensors")):
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        tensors = load_file(file)
        expected = tensors.pop("expected")
        place = workplace / file.stem
        place.mkdir()
        folder(place, json.loads(about["config"]), tensors)
        (found,) = dense(place, expected.dtype).values()
        if not torch.equal(found, expected):
            return f"{file.name}: other values"
        made_by[about["made_by"]] = made_by.get(about["made_by"], 0) + 1
    counted = [
        f"{who} ({count} recorded weight{'s' * (count > 1)})" for who, count in sorted(made_by.items(), reverse=True)
    ]
    installed = {name: version(name) for name in ("bitsandbytes", "transformers", "gguf")}
    others = row.others.format(**installed)
    return "; ".join(counted + ([others] if others else []))


def line(title: str, found: Found) -> str:
    """The format in the table."""
    row = ROWS[title]
    cells = (title, row.method, row.tensors, found.read, found.packed, found.drafted, found.checked)
    return f"| {' | '.join(cells)} |"
