"""A checkpoint that is damaged, incomplete, dishonest or of another kind is refused by name before anything is read."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import offload
from offload.checkpoint.contents import INDEX, SINGLE
from offload.checkpoint.headers import open_folder, read_header
from offload.errors import BadModelDir, CorruptShard, OffloadError, UnsupportedModel
from offload.placement.requirements import need_of
from tests.tiny import FAMILIES, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny("llama", tmp_path, max_shard_size="100KB")
    return tmp_path


def edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite_header(file: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refusal(folder: Path) -> OffloadError:
    with pytest.raises(OffloadError) as caught:
        offload.load(folder, "disk")
    return caught.value


def test_folder_without_config_is_named_with_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.txt", "b.safetensors", "c.safetensors"):
        (tmp_path / name).touch()
    error = refusal(tmp_path)
    assert (error.code, error.what) == (
        "bad_model_dir",
        f"{tmp_path} is not a model folder: config.json is missing (found 2 .safetensors files).",
    )
    assert "rename b.safetensors" in str(error.hint)


def test_pickle_is_refused(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "pickle" in refusal(folder).what


def test_truncated_shard_is_named_with_both_sizes(folder: Path) -> None:
    file = folder / SINGLE
    size_B = file.stat().st_size
    os.truncate(file, size_B - 10)
    error = refusal(folder)
    assert isinstance(error, CorruptShard)
    assert error.what == f"model.safetensors is damaged: header says {size_B} bytes, file has {size_B - 10}."


def test_appended_bytes_are_refused(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 8)
    assert isinstance(refusal(folder), CorruptShard)


@pytest.mark.parametrize(
    "start", [b"", b"\x02", struct.pack("<Q", 1 << 60), struct.pack("<Q", 0), struct.pack("<Q", 4) + b"[[[["]
)
def test_senseless_headers_are_refused(start: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(start)
    assert isinstance(refusal(folder), CorruptShard)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [0, 8]),
        ("data_offsets", [-8, 0]),
        ("data_offsets", [0, 1 << 70]),
        ("data_offsets", ["0", "8"]),
        ("data_offsets", None),
        ("dtype", "F99"),
        ("dtype", "F16"),
        ("shape", [64, 65]),
        ("shape", [-64, -64]),
        ("shape", [True, 64]),
        ("shape", "64"),
    ],
)
def test_header_entries_that_lie_are_refused(key: str, value: object, folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite_header(folder / SINGLE, lambda header: header[name].update({key: value}))
    assert isinstance(refusal(folder), CorruptShard)


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_shard_are_refused_or_sound(tmp_path: Path, noise: bytes, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + noise)
    try:
        size_B, entries = read_header(file)
    except OffloadError:
        return
    assert all(entry.offset + entry.nbytes <= size_B for entry in entries.values())


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 7])
def test_index_that_leads_out_of_the_folder_is_refused(name: object, sharded: Path) -> None:
    def change(index: dict[str, object]) -> None:
        weight_map = index["weight_map"]
        assert isinstance(weight_map, dict)
        weight_map["model.norm.weight"] = name

    edit(sharded / INDEX, change)
    error = refusal(sharded)
    assert isinstance(error, BadModelDir)
    assert "not a plain safetensors file name" in error.what


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_broken_index_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    assert isinstance(refusal(sharded), BadModelDir)


def test_link_out_of_the_folder_is_refused_but_the_hub_cache_works(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / SINGLE).rename(elsewhere / "weights")
    (folder / SINGLE).symlink_to(elsewhere / "weights")
    assert "leaves the model folder" in refusal(folder).what

    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    for part in (repo / "blobs", snapshot):
        part.mkdir(parents=True)
    for name, source in (("config.json", folder / "config.json"), (SINGLE, elsewhere / "weights")):
        (repo / "blobs" / name).write_bytes(source.read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    offload.load(snapshot, "disk")


def test_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    assert f"{victim.name} is missing" in refusal(sharded).what


def test_stray_shards_are_not_part_of_the_model(sharded: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, sharded / "stray.safetensors")
    assert open_folder(sharded).entries["model.norm.weight"].file.name != "stray.safetensors"


def test_tensor_that_the_index_places_wrongly_is_named(sharded: Path) -> None:
    def change(index: dict[str, object]) -> None:
        weight_map = index["weight_map"]
        assert isinstance(weight_map, dict)
        weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]

    edit(sharded / INDEX, change)
    assert "lacks the tensor 'model.norm.weight'" in refusal(sharded).what


def test_missing_tensor_is_never_newly_initialised(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    error = refusal(folder)
    assert "lacks 1 tensors that LlamaForCausalLM needs: model.layers.2.mlp.up_proj.weight" in error.what


def test_untied_head_may_not_be_missing_but_a_tied_one_may(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(folder).what
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    offload.load(folder, "disk")
    rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in refusal(folder).what


def test_unknown_tensors_are_refused_but_known_leftovers_are_not(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    offload.load(folder, "disk")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.surprise.weight": torch.ones(8)}))
    assert "holds 1 tensors that LlamaForCausalLM has no place for: model.layers.0.surprise" in refusal(folder).what


@pytest.mark.parametrize("layers", [3, 5])
def test_wrong_number_of_layers_is_refused(layers: int, folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=layers))
    assert isinstance(refusal(folder), BadModelDir)


def test_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    assert (
        refusal(folder).what == "'model.norm.weight' has the shape [65], which does not fit 'model.norm.weight' [64]."
    )


def test_missing_expert_is_not_filled_by_the_next_one(tmp_path: Path) -> None:
    tiny("mixtral", tmp_path)
    file = load_file(tmp_path / SINGLE)
    victim = next(name for name in file if "experts.1.w1" in name)
    rewrite(tmp_path, lambda tensors: tensors.pop(victim))
    assert "is made of 4 experts, the checkpoint holds 3" in refusal(tmp_path).what
    rewrite(tmp_path, lambda tensors: tensors.update({victim.replace("experts.1", "experts.9"): file[victim]}))
    assert isinstance(refusal(tmp_path), BadModelDir)


def test_integers_are_not_weights(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "stored as I8 and needed as float32" in refusal(folder).what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "exl3"}}, "quantised with exl3"),
        ({"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}, "'Llama9ForCausalLM' is not supported"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "'T5Model' is not supported"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGen"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(change: dict[str, object], words: str, folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(UnsupportedModel, match=words):
        offload.load(folder, "disk")


@pytest.mark.parametrize(
    "change", [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_act": "none"}]
)
def test_senseless_config_is_refused(change: dict[str, object], folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    assert isinstance(refusal(folder), BadModelDir)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_need_from_headers_agrees_with_the_loaded_model(family: str, dtype: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    exact = offload.stream_of(offload.load(tmp_path, "disk", dtype=dtype, ctx=128)).placement.need
    early = need_of(open_folder(tmp_path), 4 if dtype == "f32" else 2, ctx=128)
    assert early.disk_B == exact.disk_B
    assert early.cache_B == exact.cache_B
    for mine, theirs in zip(early.layers_B, exact.layers_B, strict=True):
        assert theirs <= mine <= theirs * 1.02 + 64
    assert (early.embeddings_B, early.head_B) == (exact.embeddings_B, exact.head_B)
