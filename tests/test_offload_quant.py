"""Weights in few bits: what is dequantised is what bitsandbytes and transformers would compute with, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import offload
from offload.checkpoint.contents import SINGLE
from offload.checkpoint.headers import Folder, open_folder
from offload.checkpoint.quantized.arithmetic.row_codes import INT8_STEP
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import CONFIGS, Quant, bitsandbytes, quantise
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.quantized.weight import Quantised
from offload.errors import CorruptShard, UnsupportedModel
from offload.placement.placement import Offload
from offload.placement.requirements import need_of
from tests.tiny import in_float32, logits_of, tiny

TIERS: tuple[Offload, ...] = ("none", "ram", "disk")
PROMPT = torch.arange(2, 32)[None]
ONE_ROW = [torch.tensor([[token]]) for token in (7, 8, 9)]  # visits half of the experts of a tiny mixture


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Folder:
    """A folder that holds just these tensors."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    return open_folder(folder)


def unpacked(weight: Quantised, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """What one thread makes of it, and three the same."""
    members = {role: tensors[entry.name] for role, entry in weight.members.items()}
    alone, shared = torch.empty(2, *weight.shape, dtype=dtype).unbind()
    dequantise(weight, members, alone)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    dequantise(weight, members, shared)
    torch.set_num_threads(before)
    assert torch.equal(alone, shared)
    return alone


def plain_nf4(tensors: dict[str, torch.Tensor], offset: float, shape: tuple[int, int]) -> torch.Tensor:
    """NF4 by the book, block after block along the flattened weight."""
    codes = [
        tensors["x.weight.quant_map"][half] for byte in tensors["x.weight"].flatten() for half in divmod(int(byte), 16)
    ]
    values = torch.stack(codes)[: shape[0] * shape[1]]
    for block in range(-(-len(values) // 64)):
        scale = tensors["x.weight.nested_quant_map"][int(tensors["x.weight.absmax"][block])]
        values[block * 64 : block * 64 + 64] *= scale * tensors["x.weight.nested_absmax"][block // 256] + offset
    return values.view(shape)


# bitsandbytes' own CPU kernel reads wrong scales for rows of 80 or 32, and an odd one has no kernel.
@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (300, 32), (7, 100), (3, 1), (5, 13)])
def test_nf4_is_what_the_book_says(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = quantise(normal(*shape), "x.weight", "nf4")
    weight = fold(stored(tmp_path, tensors)).quantised["x.weight"]
    expected = plain_nf4(tensors, weight.offsets[0], shape)
    assert torch.equal(unpacked(weight, tensors, torch.float32), expected)
    assert torch.equal(unpacked(weight, tensors, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (2000, 640)])
def test_nf4_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    dense = normal(*shape, dtype=dtype)
    tensors = quantise(dense, "x.weight", "nf4")
    folded = fold(stored(tmp_path, tensors))
    assert (set(folded.dense), set(folded.quantised)) == (set(), {"x.weight"})
    functional = bitsandbytes()
    expected = functional.dequantize_4bit(
        *functional.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    )
    assert torch.equal(unpacked(folded.quantised["x.weight"], tensors, dtype), expected)
    state = functional.QuantState.from_dict(
        {name.removeprefix("x.weight."): tensor for name, tensor in tensors.items() if name != "x.weight"},
        torch.device("cpu"),
    )
    assert torch.equal(functional.dequantize_4bit(tensors["x.weight"], state), expected)


def test_experts_are_quantised_each_by_itself(tmp_path: Path) -> None:
    dense = normal(3, 48, 40)
    tensors = quantise(dense, "experts", "nf4")
    weight = fold(stored(tmp_path, tensors)).quantised["experts"]
    for index, matrix in enumerate(unpacked(weight, tensors, torch.float32)):
        alone = quantise(dense[index], "experts.weight", "nf4")
        (tmp_path / str(index)).mkdir()
        single = fold(stored(tmp_path / str(index), alone)).quantised["experts.weight"]
        assert torch.equal(matrix, unpacked(single, alone, torch.float32))


@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 64), (700, 3000)])
def test_int8_is_the_nearest_of_255_steps_of_each_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    dense = normal(*shape)
    dense[0] = 0
    tensors = quantise(dense, "x.weight", "int8")
    weight = fold(stored(tmp_path, tensors)).quantised["x.weight"]
    found = unpacked(weight, tensors, torch.float32)
    reference = tensors["x.weight"].float() * tensors["x.SCB"][..., None] * INT8_STEP
    assert torch.equal(found, reference)
    assert ((found - dense).abs() <= tensors["x.SCB"][..., None] / 127 * 0.5001).all()
    if dense.dim() == 2:
        theirs = bitsandbytes().int8_vectorwise_dequant(tensors["x.weight"], tensors["x.SCB"])
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 24, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 24, 2), generator=generator, dtype=torch.uint8)
    tensors = {"experts.down_proj_blocks": codes, "experts.down_proj_scales": scales}
    weight = fold(stored(tmp_path, tensors)).quantised["experts.down_proj"]
    assert torch.equal(unpacked(weight, tensors, dtype), convert_moe_packed_tensors(codes, scales, dtype=dtype))


def quantised_folder(dense: Path, folder: Path, quant: Quant) -> Path:
    """What people do with transformers: load quantised, save."""
    config = BitsAndBytesConfig(
        load_in_4bit=quant == "nf4",
        load_in_8bit=quant == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def dequantised(path: Path, family_model: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the dequantised weights of the folder in it."""
    folded = fold(open_folder(path))
    tensors = load_file(path / SINGLE)
    with torch.no_grad():
        for name, weight in folded.quantised.items():
            family_model.get_parameter(name).copy_(unpacked(weight, tensors, torch.float32))
    return family_model


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoints_of_bitsandbytes_stream(family: str, quant: Quant, tmp_path: Path) -> None:
    dense = tiny(family, tmp_path / "dense", intermediate_size=128)
    path = quantised_folder(tmp_path / "dense", tmp_path / "quantised", quant)
    expected = logits_of(dequantised(path, dense), PROMPT)
    for tier in TIERS:
        ours = offload.load(path, tier)
        assert torch.equal(logits_of(ours, PROMPT), expected), tier
        offload.stream_of(ours).close()
    if quant == "nf4":  # LLM.int8 also rounds what is multiplied with the weights, so only 4 bit can agree
        theirs = in_float32(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu"))
        torch.testing.assert_close(logits_of(theirs, PROMPT), expected, rtol=1e-4, atol=1e-4)


def test_a_mixture_that_bitsandbytes_quantised_expert_by_expert_streams(tmp_path: Path) -> None:
    # As saved while every expert was a module of linears: their weights one by one, and the router too.
    tiny("mixtral", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / SINGLE)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "bnb").mkdir()
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS["nf4"]}))
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        linear = ".layers." in name and tensor.dim() == 2
        packed |= quantise(tensor, name, "nf4") if linear else {name: tensor}
    assert any(".experts.3." in name and ".quant_state." in name for name in packed)
    assert any(name.endswith("gate.weight.quant_state.bitsandbytes__nf4") for name in packed)
    save_file(packed, tmp_path / "bnb" / SINGLE)
    for name, weight in fold(open_folder(tmp_path / "bnb")).quantised.items():
        dense[name] = unpacked(weight, packed, torch.float32)
    save_file(dense, tmp_path / "dense" / SINGLE, {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for tier in TIERS:
        ours = offload.load(tmp_path / "bnb", tier)
        for tokens in (PROMPT, *ONE_ROW):
            assert torch.equal(logits_of(ours, tokens), logits_of(theirs, tokens)), (tier, tokens)
        offload.stream_of(ours).close()


def test_gpt_oss_streams_as_transformers_dequantises_it(tmp_path: Path) -> None:
    dense = tiny("gpt_oss", tmp_path, intermediate_size=128)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(tmp_path / SINGLE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        with torch.no_grad():
            dense.get_parameter(name).copy_(convert_moe_packed_tensors(codes, scales, dtype=torch.float32))
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for tier in TIERS:
        ours = offload.load(tmp_path, tier)
        for tokens in (PROMPT, *ONE_ROW):
            assert torch.equal(logits_of(ours, tokens), logits_of(dense, tokens)), (tier, tokens)
        offload.stream_of(ours).close()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_headers_alone_tell_the_exact_need(quant: Quant, tmp_path: Path) -> None:
    tiny("llama", tmp_path / "dense", intermediate_size=128)
    path = quantised_folder(tmp_path / "dense", tmp_path / "quantised", quant)
    model = offload.load(path, "disk", ctx=100)
    assert need_of(open_folder(path), 4, 100) == offload.stream_of(model).placement.need
    offload.stream_of(model).close()


def test_only_one_layer_is_dense_at_a_time(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "dense", intermediate_size=128)
    model = offload.load(quantised_folder(tmp_path / "dense", tmp_path / "q", "nf4"), "disk")
    stream = offload.stream_of(model).stream
    first, second = (stream.take(layer)["mlp.up_proj.weight"].data_ptr() for layer in (0, 1))
    assert first == second
    stream.close()


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3"}}))
    with pytest.raises(UnsupportedModel, match="quantised with exl3"):
        offload.load(tmp_path, "disk")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def set_to(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def text(content: str) -> torch.Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


STATE = "x.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "damage",
    [
        without("x.weight"),
        without("x.weight.absmax"),
        without("x.weight.nested_quant_map"),
        set_to("x.weight.absmax", torch.zeros(3, dtype=torch.uint8)),
        set_to("x.weight", torch.zeros(9, 1, dtype=torch.uint8)),
        set_to(STATE, text("{")),
        set_to(STATE, text("[1]")),
        set_to(STATE, text('{"quant_type": "nf4", "dtype": "float32", "shape": [-1, 64], "blocksize": 64}')),
        set_to(STATE, torch.zeros(2_000_000, dtype=torch.uint8)),
    ],
)
def test_damaged_states_are_refused(damage: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path) -> None:
    tensors = quantise(normal(64, 64), "x.weight", "nf4")
    damage(tensors)
    with pytest.raises(CorruptShard, match=r"x\.weight"):
        fold(stored(tmp_path, tensors))


def test_damaged_int8_and_mxfp4_are_refused(tmp_path: Path) -> None:
    codes, scales = torch.zeros(8, 64, dtype=torch.int8), torch.zeros(8)
    for tensors in (
        {"x.SCB": scales},
        {"x.weight": codes, "x.SCB": scales[:4].clone()},
        {"x.weight": codes.float(), "x.SCB": scales},
        {"x.weight": codes[0].clone(), "x.SCB": scales[:1].clone()},
        {"x_blocks": torch.zeros(2, 8, 1, 8, dtype=torch.uint8), "x_scales": torch.zeros(2, 8, 1, dtype=torch.uint8)},
        {"x_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8), "x_scales": torch.zeros(2, 8, 2, dtype=torch.uint8)},
    ):
        with pytest.raises(CorruptShard, match="damaged"):
            fold(stored(tmp_path, tensors))
    tiled = {"x.weight": codes, "x.SCB": scales, "x.weight_format": torch.tensor(1, dtype=torch.uint8)}
    with pytest.raises(UnsupportedModel, match="tiled order"):
        fold(stored(tmp_path, tiled))
