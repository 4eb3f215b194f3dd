"""A GPU never holds more of a weight's values, while it is dequantised, than a plan counts: on a simulated device."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.checkpoint.contents import SINGLE
from offload.checkpoint.documents import Json
from offload.checkpoint.gguf.ggml_types import BY_NAME
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.arithmetic import pieces, row_codes
from offload.checkpoint.quantized.formats import BY_SCHEME, dequantise
from offload.checkpoint.quantized.quantize import CONFIGS, Quant, quantise
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.quantized.weight import GPU_PIECE_B, GPU_PIECES
from offload.machine.integer_products import kernel_pays
from offload.machine.memory import Free
from offload.packs.pack import pack, plan
from offload.placement.quantized_sizes import need_in, resident_B
from offload.placement.requirements import need_of
from offload.placement.solver import place
from offload.units import GiB
from tests.quantised_files import Stored, folder
from tests.simulated.device import DEVICE, Simulator
from tests.test_quantised_formats import FORMATS
from tests.tiny import tiny

O, I = 512, 1024
PIECE_B = 64 << 10
TABLES_B = 4 << 10
"""What every code of a byte stands for."""


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """A device that minds its memory alone: who reads and writes it is another test's."""
    monkeypatch.setattr(Simulator, "_touch_all", lambda *_: None)
    for module in (pieces, row_codes):
        monkeypatch.setattr(module, "GPU_PIECE_B", PIECE_B)
    return Simulator(switches=0)


def made() -> Iterator[tuple[str, Json, Stored]]:
    """A weight in every format, and its config."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(O, I, generator=chance).bfloat16()
    for name, (config, store) in FORMATS.items():
        yield name, config, store("x", weight)
    quants: tuple[Quant, ...] = ("int8", "int4", "nf4")
    for quant in quants:
        yield quant, CONFIGS.get(quant, {"quant_method": "specexec"}), quantise(weight, "x.weight", quant)
    yield "nf4 of f16", CONFIGS["nf4"], quantise(weight.half(), "x.weight", "nf4")
    blocks = {"x.weight": weight.to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(4, 8)}
    yield "fp8", {"quant_method": "fp8"}, blocks
    words = torch.randint(256, (1, O, I // 32, 16), generator=chance).to(torch.uint8)
    yield "mxfp4", {"quant_method": "mxfp4"}, {"x_blocks": words, "x_scales": words[..., 0] // 4 + 96}
    three: Json = {"weights": {"num_bits": 3, "symmetric": True, "type": "int", "strategy": "channel"}}
    packed = words.flatten()[: O * I * 3 // 8].view(torch.int32).view(O, -1)
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": three}}
    yield "3 bits", config, {"x.weight_packed": packed, "x.weight_scale": torch.ones(O, 1)}
    for kind in ("Q4_0", "Q5_K", "Q6_K", "IQ4_XS", "F16"):
        row_B = I // BY_NAME[kind].items * BY_NAME[kind].nbytes
        codes = torch.randint(60, (O, row_B), generator=chance).to(torch.uint8)
        yield kind, None, {f"x.weight.gguf.{kind}": codes.view(torch.float16) if kind == "F16" else codes}


@pytest.mark.parametrize(("config", "stored"), [pytest.param(*one[1:], id=one[0]) for one in made()])
def test_pieces_are_all_that_is_beside_a_weight(
    config: Json, stored: Stored, tmp_path: Path, simulator: Simulator
) -> None:
    folder(tmp_path, config, stored)
    tensors = load_file(tmp_path / SINGLE)
    (weight,) = fold(open_folder(tmp_path)).quantised.values()
    wanted = torch.empty(weight.shape, dtype=torch.bfloat16)
    members = {role: tensors[entry.name] for role, entry in weight.members.items()}
    dequantise(weight, members, wanted)
    with simulator:
        there = {role: tensor.to(DEVICE) for role, tensor in members.items()}
        target = torch.empty(weight.shape, dtype=torch.bfloat16, device=DEVICE)
        before_B = simulator.held_B
        simulator.most_B = before_B
        dequantise(weight, there, target)
        planned_B = GPU_PIECES * PIECE_B + weight.tables_B
        assert simulator.most_B - before_B <= planned_B + TABLES_B < 2 * wanted.numel()
        assert torch.equal(target.cpu().nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_products_in_integers_come_piece_by_piece_too(quant: Quant, tmp_path: Path, simulator: Simulator) -> None:
    chance = torch.Generator().manual_seed(0)
    folder(tmp_path, CONFIGS.get(quant, {"quant_method": "specexec"}),
           quantise(torch.randn(O, I, generator=chance), "x.weight", quant))  # fmt: skip
    tensors = load_file(tmp_path / SINGLE)
    (weight,) = fold(open_folder(tmp_path)).quantised.values()
    as_stored = BY_SCHEME[weight.scheme].as_stored
    assert as_stored is not None
    members = {role: tensors[entry.name] for role, entry in weight.members.items()}
    rows = torch.randn(20, I, generator=chance)
    wanted = torch.nn.functional.linear(rows, as_stored(members, torch.float32))
    with simulator:
        there = as_stored({role: tensor.to(DEVICE) for role, tensor in members.items()}, torch.float32)
        asked = rows.to(DEVICE)
        # Tried once. Without torch's kernel both factors pass through float32.
        floats_B = 0 if kernel_pays(DEVICE.type) else 4 * I * (2 * len(rows) + 64)
        before_B = simulator.held_B
        simulator.most_B = before_B
        found = torch.nn.functional.linear(asked, there)
        own_B = 2 * rows.numel() + found.nbytes  # the rows in integers, and the result
        assert simulator.most_B - before_B <= GPU_PIECES * PIECE_B + own_B + floats_B + 8 * TABLES_B < 2 * O * I
        assert torch.equal(found.cpu(), wanted)


def test_a_plan_counts_them_on_a_gpu_and_only_there(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "whole")
    whole = open_folder(tmp_path / "whole")
    assert need_of(whole, 2, 64).passing_B == 0
    pack(plan(whole, "int8"), tmp_path / "pack")
    packed = open_folder(tmp_path / "pack")
    (largest,) = {math.prod(one.shape) for one in whole.entries.values() if one.name.endswith("0.mlp.up_proj.weight")}
    tables_B = max(weight.tables_B for weight in fold(packed).quantised.values())
    wanted_B = GPU_PIECES * 4 * largest + tables_B
    assert need_of(packed, 2, 64).passing_B == wanted_B < GPU_PIECES * GPU_PIECE_B
    assert need_in(whole, "int8", 2, 64).passing_B == need_of(packed, 2, 64).passing_B
    assert offload.stream_of(offload.load(tmp_path / "pack", ctx=64)).placement.need.passing_B == wanted_B
    need, label = need_of(packed, 2, 64), "weights while they are dequantised"
    on_gpu, on_cpu = (place(need, Free(GiB, vram_B), "none") for vram_B in (GiB, None))
    assert on_gpu.device_parts_B[label] == need.passing_B
    assert label not in on_gpu.host_parts_B | on_cpu.host_parts_B
    less = dataclasses.replace(need, passing_B=0)
    assert on_gpu.device_B == (place(less, Free(GiB, GiB), "none").device_B or 0) + need.passing_B
    drafter_B = [resident_B(packed, "none", 2, 64, on_gpu=on_gpu) for on_gpu in (False, True)]
    assert drafter_B[1] - drafter_B[0] == need.passing_B
