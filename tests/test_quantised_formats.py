"""Checkpoints in other packages' formats stream, are planned, packed and refused by name, each in the same way."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.checkpoint.contents import SINGLE
from offload.checkpoint.documents import Json
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.formats import METHODS
from offload.checkpoint.quantized.stored import check_orders, fold
from offload.errors import CorruptShard, OffloadError, UnsupportedModel
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.placement.requirements import need_of
from tests.quantised_files import Stored, dense, folder, rewrite, set_config
from tests.tiny import logits_of, tiny

TIERS: tuple[Offload, ...] = ("none", "ram", "disk")
PROMPT = torch.arange(2, 32)[None]
GROUP = 32


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(sum(shape))).int()


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).half() / 50 + 0.001


def awq(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    G = I // GROUP
    return {f"{name}.qweight": words(I, O // 8), f"{name}.qzeros": words(G, O // 8), f"{name}.scales": scales(G, O)}


def gptq(name: str, weight: torch.Tensor) -> Stored:
    """The keys in 8 bits, the others in 4, with an order."""
    O, I = weight.shape
    G, each = I // GROUP, 4 if "k_proj" in name else 8
    order = (torch.arange(I).flip(0) // GROUP).int()
    codes = {f"{name}.qweight": words(I // each, O), f"{name}.qzeros": words(G, O // each)}
    return {**codes, f"{name}.scales": scales(G, O), f"{name}.g_idx": order}


def packed(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    shape = torch.tensor([O, I])
    codes = {f"{name}.weight_packed": words(O, I // 8), f"{name}.weight_shape": shape}
    return {**codes, f"{name}.weight_scale": scales(O, I // GROUP).bfloat16()}


def nvfp4(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    return {
        f"{name}.weight": words(O, I // 8).view(torch.uint8),
        f"{name}.weight_scale": scales(O, I // 16).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(0.5),
        f"{name}.input_scale": torch.tensor(1.0),
    }


def mlx(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    grid = scales(O, I // GROUP)
    return {f"{name}.weight": words(O, I // 8).view(torch.uint32), f"{name}.scales": grid, f"{name}.biases": -8 * grid}


def torchao(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    zeros = words(O, I // GROUP // 2).view(torch.int8)[:, : I // GROUP]
    codes = words(O, I // 4).view(torch.int8)
    named = {"qdata": codes, "scale": scales(O, I // GROUP).bfloat16(), "zero_point": zeros}
    return {f"{name}._weight_{role}": tensor for role, tensor in named.items()}


def torchao_int4(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    grid = scales(I // GROUP, O).bfloat16()
    named = {"qdata": words(O, I // 8).view(torch.int8), "scale": grid, "zero_point": grid.flip(0)}
    return {f"{name}._weight_{role}": tensor for role, tensor in named.items()}


def hqq(name: str, weight: torch.Tensor) -> Stored:
    O, I = weight.shape
    groups = O * I // GROUP
    about = {"shape": torch.tensor([O, I]), "nbits": torch.tensor(4).int(), "axis": torch.tensor(1).int()}
    codes = {"W_q": words(groups // 2, GROUP // 4).view(torch.uint8), "scale": scales(groups, 1)}
    return {f"{name}.{role}": tensor for role, tensor in {**codes, "zero": scales(groups, 1) * 300, **about}.items()}


WEIGHTS: Json = {"num_bits": 4, "group_size": GROUP, "symmetric": True, "type": "int", "strategy": "group"}
GROUPS: Json = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
FORMATS: dict[str, tuple[dict[str, Json], Callable[[str, torch.Tensor], Stored]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
        packed,
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "mlx": ({"quant_method": "MLX", "bits": 4, "group_size": GROUP}, mlx),
    "torchao": ({"quant_method": "torchao"}, torchao),
    "torchao_int4": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        torchao_int4,
    ),
    "hqq": ({"quant_method": "hqq"}, hqq),
}


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in the format; its down projections are left whole, as recipes leave some."""
    path = tmp_path_factory.mktemp(request.param)
    tiny("llama", path)
    config, store = FORMATS[request.param]

    def some(name: str, weight: torch.Tensor) -> Stored:
        return {f"{name}.weight": weight} if name.endswith("down_proj") else store(name, weight)

    return rewrite(path, config, some)


def test_a_file_computes_what_its_dequantised_weights_compute(made: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    weights = dense(made)
    assert len(weights) == 4 * 6
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    for tier in TIERS:
        ours = offload.load(made, tier, dtype="f32")
        for tokens in (PROMPT, PROMPT[:, :1]):
            assert torch.equal(logits_of(ours, tokens), logits_of(model, tokens)), tier
        offload.stream_of(ours).close()


def test_headers_alone_tell_what_a_file_needs(made: Path) -> None:
    loaded = offload.load(made, "disk", dtype="f32", ctx=100)
    need, found = need_of(open_folder(made), 4, 100), offload.stream_of(loaded).placement.need
    assert (need.read_B, need.dense_B) == (found.read_B, found.dense_B)
    assert all(a >= b for a, b in zip(need.layers_B, found.layers_B, strict=True))
    offload.stream_of(loaded).close()


def test_a_pack_keeps_the_codes(made: Path, tmp_path: Path) -> None:
    pack(plan(open_folder(made), "none"), tmp_path / "pack")
    expected = logits_of(offload.load(made, "none", dtype="f32"), PROMPT)
    assert torch.equal(logits_of(offload.load(tmp_path / "pack", "disk", dtype="f32"), PROMPT), expected)


def test_a_damaged_header_is_refused_and_never_more(made: Path, tmp_path: Path) -> None:
    """Types, shapes and settings changed at random; SPECEXEC_MUTATIONS sets how many, more of them run by hand."""
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    tensors = {name: one for name, one in load_file(made / SINGLE).items() if ".0.self_attn." in name}
    chance = random.Random(0)
    refused = 0
    for _ in range(int(os.environ.get("SPECEXEC_MUTATIONS", "60"))):
        changed = dict(tensors)
        name = chance.choice(sorted(changed))
        one = changed.pop(name)
        if chance.random() < 0.8:
            flat = one.reshape(-1).view(torch.uint8)
            kind = chance.choice((torch.uint8, torch.int32, torch.float16, torch.float32, torch.float8_e4m3fn))
            flat = flat[: len(flat) // chance.choice((1, 1, 2, 3)) // 4 * 4].view(kind)
            rows = chance.choice([rows for rows in (1, 2, 3, 8, 32, 64) if len(flat) % rows == 0])
            shapes = (flat, flat.view(rows, -1), flat.view(1, rows, -1), flat[:0], flat[:0].view(0, 5))
            changed[name] = chance.choice(shapes)
        settings = dict(config)
        if chance.random() < 0.3:
            wrong: tuple[Json, ...] = (None, 0, -1, 3, 1 << 40, "x", [], {}, True, 2.5)
            settings[chance.choice(sorted(settings))] = chance.choice(wrong)
            settings["quant_method"] = config["quant_method"]
        folder(tmp_path, settings, changed)
        try:
            for weight in fold(open_folder(tmp_path)).quantised.values():
                assert 0 < torch.Size(weight.shape).numel() <= 8 * sum(one.nbytes for one in changed.values())
            dense(tmp_path)
        except OffloadError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "the layout 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "AWQ in 8 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "the format 'marlin'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed-tensors, marlin-24"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}, "transforms"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"modelopt \(W4A8_AWQ\)"),
        ({"quant_method": "MLX", "mode": "mxfp4"}, "its mode 'mxfp4'"),
    ],
)
def test_what_cannot_be_undone_is_refused_by_name(config: dict[str, Json], says: str, tmp_path: Path) -> None:
    folder(tmp_path, config, {"x.weight": torch.zeros(4)})
    with pytest.raises(UnsupportedModel, match=says) as refusal:
        fold(open_folder(tmp_path))
    assert "16-bit" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"qdata": words(4, 1, 32, 4), "scale_and_zero": scales(8, 32, 2).bfloat16()}, "scale_and_zero BF16"),
        ({"qdata": words(32, 8), "scale": scales(2, 32), "zero_point": words(1, 16).view(torch.int8)}, "qdata I32"),
        ({"qdata": words(2, 8, 8).view(torch.int8), "scale": scales(2, 2, 8), "zero_point": scales(2, 2, 8)}, "qdata"),
    ],
    ids=["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "experts"],
)
def test_torchaos_other_layouts_of_four_bits_are_refused_by_name(tensors: Stored, says: str, tmp_path: Path) -> None:
    folder(tmp_path, FORMATS["torchao_int4"][0], {f"x._weight_{role}": one for role, one in tensors.items()})
    with pytest.raises(UnsupportedModel, match=rf"'x\.weight' is in a layout of torchao .*{says}") as refusal:
        fold(open_folder(tmp_path))
    assert "Int4Tensor (int4_packing_format 'plain')" in str(refusal.value.why)


def test_torchaos_floats_that_are_added_are_read_where_config_json_names_their_config(tmp_path: Path) -> None:
    """The same shapes could be those of integers in bytes with zero points in floats."""
    folder(tmp_path, {"quant_method": "torchao"}, torchao_int4("x", torch.zeros(32, 64)))
    with pytest.raises(UnsupportedModel, match=r"'x.weight' is in a layout of torchao .*zero_point BF16 \[2, 32\]"):
        fold(open_folder(tmp_path))


def test_torchaos_stacks_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path, FORMATS["torchao_int4"][0], {"mlp.experts._gate_up_proj_qdata": words(2, 4, 4)})
    with pytest.raises(UnsupportedModel, match=r"'mlp\.experts\._gate_up_proj_qdata' is part"):
        fold(open_folder(tmp_path))


def test_every_method_that_is_read_is_in_the_table_of_the_documents() -> None:
    page = (Path(__file__).parents[1] / "docs" / "quantized.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table: formats -->")[2].partition("<!-- end -->")[0]
    # Two are named otherwise in the files themselves.
    marks = {method: {"gguf": "[GGUF]", "MLX": "MLX in"}.get(method, f"`{method}`") for method in METHODS}
    assert not [method for method, mark in marks.items() if mark not in table]


def test_settings_beside_config_json_are_read(tmp_path: Path) -> None:
    folder(tmp_path, None, nvfp4("x", torch.zeros(32, 64)))
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    assert set(dense(tmp_path)) == {"x.weight"}


def test_mlx_names_itself_under_another_key(tmp_path: Path) -> None:
    folder(tmp_path, None, mlx("x", torch.zeros(32, 64)))
    for both in (False, True):
        config = {"bits": 4, "group_size": GROUP}
        text = {"model_type": "llama", "quantization": config} | ({"quantization_config": config} if both else {})
        (tmp_path / "config.json").write_text(json.dumps(text))
        assert set(dense(tmp_path)) == {"x.weight"}
    set_config(tmp_path, {**config, "quant_method": "MLX", "x": {"bits": 8, "group_size": GROUP}})
    with pytest.raises(OffloadError, match="in 8 bits"):
        fold(open_folder(tmp_path))


def test_an_order_and_exponents_are_what_the_book_says(tmp_path: Path) -> None:
    O, I = 8, 64
    order = (torch.arange(I) * 7 % I // GROUP).int()
    asymmetric: Json = {"g": {"weights": {"num_bits": 4, "group_size": GROUP, "symmetric": False}}}
    config: dict[str, Json] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    tensors = {**packed("x", torch.zeros(O, I)), "x.weight_zero_point": words(O // 8, I // GROUP)}
    folder(tmp_path, config | {"config_groups": asymmetric}, {**tensors, "x.weight_g_idx": order})
    codes = [[int(tensors["x.weight_packed"][o, i // 8]) >> 4 * (i % 8) & 15 for i in range(I)] for o in range(O)]
    zeros = [[int(tensors["x.weight_zero_point"][0, g]) >> 4 * o & 15 for g in range(I // GROUP)] for o in range(O)]
    grid = tensors["x.weight_scale"].float()
    book = [[(codes[o][i] - zeros[o][order[i]]) * float(grid[o, order[i]]) for i in range(I)] for o in range(O)]
    assert torch.equal(dense(tmp_path)["x.weight"], torch.tensor(book))

    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    bytes_, powers = words(O, I // 8).view(torch.uint8), torch.arange(O * I // 32).view(O, -1).to(torch.uint8) + 120
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    folder(tmp_path, config, {"x.weight_packed": bytes_, "x.weight_scale": powers})
    halves = [[int(bytes_[o, i // 2]) >> 4 * (i % 2) & 15 for i in range(I)] for o in range(O)]
    book = [
        [(-1) ** (half >> 3) * values[half & 7] * 2.0 ** (int(powers[o, i // 32]) - 127) for i, half in enumerate(row)]
        for o, row in enumerate(halves)
    ]
    assert torch.equal(dense(tmp_path)["x.weight"], torch.tensor(book))


def test_a_group_that_is_not_there_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    def store(name: str, weight: torch.Tensor) -> Stored:
        stored = dict(gptq(name, weight))
        stored[f"{name}.g_idx"][5] = weight.shape[1] // GROUP
        return stored

    tiny("llama", tmp_path)
    rewrite(tmp_path, FORMATS["gptq"][0], store, only="q_proj.weight")
    with pytest.raises(CorruptShard, match=r"'model\.layers\.0\.self_attn\.q_proj\.g_idx' names group 2, there are 2"):
        offload.load(tmp_path, "disk", dtype="f32")


def test_an_order_that_is_filled_in_part_is_refused(tmp_path: Path) -> None:
    config: Json = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    stored = dict(gptq("x", torch.zeros(64, 64)))
    stored["x.g_idx"][3] = -1
    folder(tmp_path, config, stored)
    with pytest.raises(CorruptShard, match=r"'x\.g_idx' names group -1, and others that are there"):
        check_orders(fold(open_folder(tmp_path)))


def test_few_outputs_have_the_bits_and_groups_that_config_json_names(tmp_path: Path) -> None:
    """Zero points of 8 outputs fill one word in 2, 3 and 4 bits; of 48 inputs the last group has 16."""
    O, I = 8, 48
    tensors = {"x.qweight": words(I // 8, O), "x.qzeros": words(2, 1), "x.scales": scales(2, O)}
    codes = [[int(tensors["x.qweight"][i // 8, o]) >> 4 * (i % 8) & 15 for i in range(I)] for o in range(O)]
    zeros = [[(int(tensors["x.qzeros"][g, 0]) >> 4 * o & 15) + 1 & 15 for g in range(2)] for o in range(O)]
    grid = tensors["x.scales"].float()
    book = [[(codes[o][i] - zeros[o][i // 32]) * float(grid[i // 32, o]) for i in range(I)] for o in range(O)]
    folder(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    assert torch.equal(dense(tmp_path)["x.weight"], torch.tensor(book))
    three = {"x.qweight": words(5, O), "x.qzeros": words(3, 1), "x.scales": scales(3, O)}
    folder(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, three)
    with pytest.raises(CorruptShard, match="3 groups for 40 inputs"):
        fold(open_folder(tmp_path))


def test_floats_of_other_layers_do_not_make_integers_ambiguous(tmp_path: Path) -> None:
    """Without the files nothing but headers says which kind a weight is."""
    kinds: dict[str, Json] = {
        "a": {"weights": {"num_bits": 8, "type": "float", "symmetric": True}},
        "b": {"weights": {"num_bits": 4, "type": "int", "symmetric": True}},
    }
    config: dict[str, Json] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": kinds,
    }
    folder(tmp_path, config, {"x.weight_packed": words(8, 8), "x.weight_scale": scales(8, 1)})
    (weight,) = fold(replace(open_folder(tmp_path), here=False)).quantised.values()
    assert (weight.bits, weight.shape) == (4, (8, 64))


def test_groups_of_mlx_end_with_their_row(tmp_path: Path) -> None:
    tensors = {"x.weight": words(8, 12).view(torch.uint32), "x.scales": scales(8, 1), "x.biases": scales(8, 1)}
    folder(tmp_path, {"quant_method": "MLX", "bits": 4, "group_size": 64}, tensors)
    with pytest.raises(CorruptShard, match="groups of 64"):
        fold(open_folder(tmp_path))
