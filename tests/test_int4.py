"""int4: 8-bit integers in 4.5 bits. As near as 4 bits come, computed as int8 is, the same text from every place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized import int4
from offload.checkpoint.quantized.arithmetic import group_codes, row_codes
from offload.checkpoint.quantized.arithmetic.group_codes import GroupCodes, in_groups
from offload.checkpoint.quantized.arithmetic.row_codes import INT8_STEP, RowCodes
from offload.checkpoint.quantized.int4 import GROUP
from offload.checkpoint.quantized.quantize import Quant, bitsandbytes, quantise
from offload.errors import CorruptShard
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.placement.quantized_sizes import need_in, work_of
from offload.placement.requirements import Compute, need_of
from specexec.drafters.none import NoDrafter
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import tiny
from tests.writing import greedy, prompt, write

TIERS: tuple[Offload, ...] = ("none", "ram", "disk")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: torch.Tensor) -> tuple[GroupCodes, torch.Tensor]:
    codes, steps, origins, scales = in_groups(weight)
    return GroupCodes(codes, steps, origins), scales


def dense(weight: torch.Tensor) -> torch.Tensor:
    """What a matrix is after it was stored: integers, one scale a row."""
    codes, scales = stored(weight)
    return (codes[:].float() * scales[:, None] * INT8_STEP).to(weight.dtype)


@settings(max_examples=60)
@given(groups=st.integers(1, 4), rows=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_integers_that_can_be_stored_come_back_as_they_were(groups: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 17, (rows, groups, 1), generator=generator)
    codes = torch.randint(0, 16, (rows, groups, GROUP), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # both ends are there
    lowest = (torch.rand(rows, groups, 1, generator=generator) * (254 - 15 * steps)).long() - 127
    lowest[:, 0] = -127  # so that a unit is one integer
    whole = (lowest + steps * codes).flatten(1)
    found, scales = stored(whole.float() / 127 * 3)
    assert torch.equal(found[:].long(), whole)
    torch.testing.assert_close(scales, torch.full((rows,), 3.0))


@settings(max_examples=40)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 10_000), wild=st.booleans())
def test_every_number_gets_the_nearest_code_of_its_group(rows: int, groups: int, seed: int, wild: bool) -> None:
    weight = noise(rows, groups * GROUP, seed=seed)
    if wild:
        weight[0] = 0
        weight[-1, ::7] *= 1000
    codes, steps, origins, scales = in_groups(weight)
    values = GroupCodes(codes, steps, origins)[:].float()
    unit = (scales / 127).clamp(min=1e-30)[:, None]
    can_be = origins[..., None].float() + steps[..., None].float() * torch.arange(16)
    assert can_be.min() >= -128
    assert can_be.max() <= 127
    away = (weight / unit).unflatten(1, (-1, GROUP))[..., None] - can_be[:, :, None]
    torch.testing.assert_close((weight / unit - values).abs(), away.abs().amin(-1).flatten(1), atol=1e-3, rtol=1e-4)


def test_it_is_nearer_to_the_weights_than_nf4() -> None:
    weight = noise(256, 1024)
    functional = bitsandbytes()
    nf4 = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    error, other = ((dense(weight) - weight).square().mean() for _ in (0, 1))
    other = (nf4 - weight).square().mean()
    assert error < 0.75 * other


@settings(max_examples=20)
@given(rows=st.integers(1, 6), groups=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_compiled_loop_and_torch_expand_to_the_same_integers(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, groups * GROUP // 2), dtype=torch.uint8, generator=generator)
    steps = torch.randint(1, 18, (rows, groups), dtype=torch.uint8, generator=generator)
    origins = torch.randint(-128, 128, (rows, groups), dtype=torch.int8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        found = GroupCodes(codes, steps, origins)[:]
        patch.setattr(group_codes, "compiled", lambda _: None)
        assert torch.equal(GroupCodes(codes, steps, origins)[:], found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_has_the_bits_of_the_same_integers_in_int8(dtype: torch.dtype) -> None:
    codes, scales = stored(noise(900, 640))
    rows, bias = noise(21, 640, seed=1).to(dtype), noise(900, seed=2).to(dtype)
    few, whole = (RowCodes.of(one, scales, dtype) for one in (codes, codes[:]))
    found = nn.functional.linear(rows, few, bias)
    assert torch.equal(found, nn.functional.linear(rows, whole, bias))
    assert torch.equal(nn.functional.linear(rows[3:4].clone(), few, bias), found[3:4])
    assert torch.equal(few.clone(), whole.clone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_codes, "most_rows_of_loops", lambda _: 0)
        assert torch.equal(nn.functional.linear(rows.clone(), few, bias), found)


@pytest.fixture
def packed(pack_of: Callable[[str, Quant], Path]) -> Callable[[str], Path]:
    """The int4 pack of a tiny model; the model itself lies beside it as `whole`."""
    return lambda family: pack_of(family, "int4")


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model with the numbers that the pack holds, experts' too."""
    for name, weight in model.model.layers.named_parameters():
        router = name.endswith(("gate.weight", "router.weight"))
        if weight.dim() == 2 and not router:
            weight.data = dense(weight.data)
        elif weight.dim() == 3:
            weight.data = torch.stack([dense(one) for one in weight.data])
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_text_is_what_transformers_writes_with_these_weights(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = packed(family)
    wanted = greedy(rounded(tiny(family, tmp_path / "whole")), prompt(12), 12)
    in_integers: set[tuple[int, ...]] = set()
    for tier in TIERS:
        for compute in ("float", "int8"):
            model = offload.load(folder, tier, compute=compute)
            lm = TreeLM(model, tiled=not offload.stream_of(model).in_integers)
            sampling = SamplingParams(temperature=0.0, max_tokens=12)
            (sequence,) = write(lm, NoDrafter(), [prompt(12)], sampling, 0)
            lm.close()
            if compute == "float":
                assert sequence.answer == wanted, tier
            else:
                in_integers.add(tuple(sequence.answer))
    assert len(in_integers) == 1


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_plan_counts_what_is_taken(family: str, compute: Compute, packed: Callable[[str], Path]) -> None:
    folder = packed(family)
    listed, whole = open_folder(folder), open_folder(folder.with_name("whole"))
    stream = offload.stream_of(offload.load(folder, compute=compute, ctx=100))
    need = stream.placement.need
    assert need_of(listed, 4, 100, compute=compute) == need
    foretold = need_in(whole, "int4", 4, 100, compute=compute)
    routers_B = 4 * 64 * 4 if family == "mixtral" else 0  # headers do not tell them from linears
    for said_B, true_B in zip(foretold.layers_B, need.layers_B, strict=True):
        assert abs(true_B - said_B) <= routers_B + 4096  # a page before what is read in place
    work = work_of(listed, "none", 4, compute=compute)
    assert work.unpacked_B["int4"] > 0
    assert (work.whole_numbers > 0) == (compute == "int8")


def test_a_pack_is_as_large_as_said_and_leaves_odd_rows_whole(tmp_path: Path) -> None:
    tiny("llama", tmp_path / "whole", intermediate_size=72)
    planned = plan(open_folder(tmp_path / "whole"), "int4")
    pack(planned, tmp_path / "int4")
    layer = load_file(tmp_path / "int4" / "layer-00000.safetensors")
    whole = {name for name, tensor in layer.items() if tensor.dim() == 2 and tensor.dtype == torch.float32}
    assert whole == {"model.layers.0.mlp.down_proj.weight"}
    size_B = sum(file.stat().st_size for file in (tmp_path / "int4").glob("*.safetensors"))
    assert size_B <= planned.size_B <= size_B + 4096 * len(planned.shards)
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "specexec"
    offload.load(tmp_path / "int4")


def test_stacks_come_back_each_by_itself() -> None:
    weight = noise(3, 8, 64)
    made = quantise(weight, "layers.0.experts", "int4")
    assert made["layers.0.experts"].shape == (3, 8, 32)
    for index, matrix in enumerate(weight):
        alone = quantise(matrix, "layers.0.experts", "int4")
        assert all(torch.equal(made[name][index], alone[name]) for name in made)
    assert sum(tensor.nbytes for tensor in made.values()) == int4.size_B((3, 8, 64))


@pytest.mark.parametrize("role", int4.ROLES)
def test_parts_that_do_not_belong_together_are_refused_by_name(
    role: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = packed("llama")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    name = f"model.layers.1.mlp.up_proj.int4_{role}"
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    deeper = tensors[name][None].clone()
    for damage in ({name: tensors[name][:-1].clone()}, {name: deeper}, {name: tensors[name].half()}, {}):
        save_file({**others, **damage}, tmp_path / "model.safetensors")
        with pytest.raises(CorruptShard if damage else offload.OffloadError, match=r"layers\.1\.mlp\.up_proj"):
            offload.load(tmp_path)
