"""Folders that are no safetensors checkpoint, or an unusual one: loaded, or refused by what they are."""

from __future__ import annotations

import base64
import json
import logging
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

import offload
from offload.checkpoint.contents import INDEX, SINGLE, instead
from offload.checkpoint.gguf.consolidated import INSIDE, OUTSIDE
from offload.checkpoint.gguf.tekken import two_parts
from offload.hub.local_models import describe
from offload.hub.names import called
from tests.gguf_files import write_gguf
from tests.tiny import logits_of, tiny

PROMPT = torch.arange(2, 10)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file and the same one in three."""
    path = tmp_path_factory.mktemp("made")
    tiny("llama", path / "single")
    tiny("llama", path / "sharded", max_shard_size="200KB")
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        for file in (made / kind).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copied


def refusal(folder: Path) -> offload.OffloadError:
    with pytest.raises(offload.OffloadError) as caught:
        offload.load(folder, "none")
    assert caught.value.hint, "there is a way out"
    return caught.value


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter (LoRA)"),
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "Mistral's or Meta's own format"),
        (["config.json", "params.json", "consolidated.safetensors"], "Mistral's or Meta's own format"),
        (["config.json", "pytorch_model.bin"], "as pickle (pytorch_model.bin)"),
        (["config.json", "model-00001-of-00002.safetensors"], f"is incomplete: {INDEX} is missing"),
        (["config.json", "model.fp16.safetensors", "model.bf16.safetensors"], "as the variants bf16, fp16"),
        (["model_index.json", "config.json"], "is a diffusers pipeline"),
        (["config.json", "model.onnx"], "an ONNX export (model.onnx)"),
        (["config.json", "tf_model.h5"], "TensorFlow weights"),
        (["config.json", "flax_model.msgpack"], "Flax weights"),
        (["config.json", "llama.safetensors"], f"neither {SINGLE} nor {INDEX} is there (found 1 .safetensors files)"),
        (["tokenizer.json", "tokenizer_config.json"], "config.json is missing"),
        (["config.json", "tokenizer.json"], "neither"),
        ([], "it is empty"),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_what_it_is(files: list[str], says: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text('{"base_model_name_or_path": "org/base"}')
    error = refusal(tmp_path)
    assert error.code == "bad_model_dir"
    assert says in error.what
    if "adapter_config.json" in files:
        assert "org/base" in str(error.why)
        assert "--lora" in str(error.hint)
    if files and files[0] == "tokenizer.json":
        assert "a tokenizer and no weights" in str(error.why)


def test_a_repository_of_gguf_files_is_refused_with_the_way_to_one_of_them() -> None:
    error = instead("org/model-GGUF", ["model-Q4_K_M.gguf", "model-Q8_0.gguf"], {})
    assert "found 2 .gguf files" in error.what
    assert "hf download REPOSITORY FILE.gguf" in str(error.hint)


def test_a_pickled_head_that_is_not_read_is_refused_with_what_is_missing() -> None:
    here = instead("./head", ["medusa_lm_head.pt"], {})
    assert (here.what, here.hint) == (
        "./head holds a head (medusa_lm_head.pt), and config.json is missing.",
        "the config.json of its repository beside it.",
    )
    there = instead("org/head", ["config.json", "hydra_lm_head.pt"], {})
    assert "no pickle is downloaded" in there.what
    assert "hf download org/head" in str(there.hint)


def test_the_folder_around_a_model_names_the_model(folder: Callable[[str], Path]) -> None:
    single = folder("single")
    assert f"{single}, which is one." == refusal(single.parent).hint


def test_a_pointer_of_git_lfs_is_named(folder: Callable[[str], Path]) -> None:
    single = folder("single")
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
    error = refusal(single)
    assert "pointer of Git LFS" in error.what
    assert "git lfs pull" in str(error.hint)


def test_a_gguf_file_by_another_name_is_named_and_read(folder: Callable[[str], Path], tmp_path: Path) -> None:
    single = folder("single")
    write_gguf(tiny("llama", tmp_path / "dense"), tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf").replace(single / SINGLE)
    error = refusal(single)
    assert "is a GGUF file by another name" in error.what
    assert error.hint == f"-m {single / SINGLE}"
    assert describe(single / SINGLE).bits_per_weight == 32


def test_a_safetensors_file_by_another_name_is_named(folder: Callable[[str], Path]) -> None:
    single = folder("single")
    (single / SINGLE).rename(single / "model.gguf")
    error = refusal(single / "model.gguf")
    assert "is not a GGUF file" in error.what
    assert "safetensors" in str(error.why)


def test_the_only_variant_is_loaded(folder: Callable[[str], Path], made: Path) -> None:
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    single = folder("single")
    (single / SINGLE).rename(single / "model.fp16.safetensors")
    assert torch.equal(logits_of(offload.load(single, "none"), PROMPT), expected)
    assert "variant 'fp16'" in str(offload.open_folder(single).notes)
    sharded = folder("sharded")
    index = json.loads((sharded / INDEX).read_text())
    for name in {*index["weight_map"].values()}:
        (sharded / name).rename(sharded / name.replace("model-", "model.fp16-"))
    index["weight_map"] = {key: name.replace("model-", "model.fp16-") for key, name in index["weight_map"].items()}
    (sharded / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    (sharded / INDEX).unlink()
    assert torch.equal(logits_of(offload.load(sharded, "none"), PROMPT), expected)


def test_all_shards_without_their_index_are_loaded(folder: Callable[[str], Path], made: Path) -> None:
    sharded = folder("sharded")
    (sharded / INDEX).unlink()
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    assert torch.equal(logits_of(offload.load(sharded, "none"), PROMPT), expected)
    assert INDEX in str(offload.open_folder(sharded).notes)
    sorted(sharded.glob("*.safetensors"))[0].unlink()
    assert "is incomplete" in refusal(sharded).what


def test_quantisation_settings_without_a_method_over_plain_weights_mean_nothing(
    folder: Callable[[str], Path], made: Path
) -> None:
    single = folder("single")
    change(single / "config.json", quantization_config={"bits": 4, "modules_to_not_convert": []})
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    assert torch.equal(logits_of(offload.load(single, "none"), PROMPT), expected)
    assert "names no method" in str(offload.open_folder(single).notes)
    assert not offload.is_quantised(offload.open_folder(single))
    tensors = load_file(single / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, single / SINGLE)
    assert "a method that its config.json does not name" in refusal(single).what


def test_scales_beside_whole_weights_are_left_out_and_said(folder: Callable[[str], Path], made: Path) -> None:
    single = folder("single")
    tensors = load_file(single / SINGLE)
    stray = {one: torch.ones(1) for one in ("q_proj.weight_scale", "q_proj.input_scale", "v_proj.weight_scale_inv")}
    save_file(tensors | {f"model.layers.0.self_attn.{name}": one for name, one in stray.items()}, single / SINGLE)
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    assert torch.equal(logits_of(offload.load(single, "none"), PROMPT), expected)
    assert "3 scales beside whole weights are left out" in str(offload.open_folder(single).notes)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}, single / SINGLE)
    assert "no place for" in refusal(single).what  # of weights that are not whole the method has to be named


def test_keys_of_the_base_model_alone_are_loaded(folder: Callable[[str], Path], made: Path) -> None:
    single = folder("single")
    save_file({key.removeprefix("model."): one for key, one in load_file(single / SINGLE).items()}, single / SINGLE)
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    assert torch.equal(logits_of(offload.load(single, "disk"), PROMPT), expected)


@pytest.fixture
def consolidated(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A tiny Mistral in its publisher's own layout, and transformers' model of it."""
    truth, path = tiny("mistral", tmp_path / "hf"), tmp_path / "consolidated"
    path.mkdir()
    config, names = truth.config, {ours: theirs for theirs, ours in {**INSIDE, **OUTSIDE}.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "hf" / SINGLE).items():
        path_, end = name.removesuffix(".weight"), name.removeprefix("model.layers.").split(".")
        inside = path_.partition(f"layers.{end[0]}.")[2]
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if count := heads.get(inside):  # as Mistral's code has them: both halves of a head in turns
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape).contiguous()
        key = f"layers.{end[0]}.{names[inside]}" if inside else names[path_]
        tensors[f"{key}.weight"] = tensor
    save_file(tensors, path / "consolidated.safetensors")
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"], "sliding_window": config.sliding_window,
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps(params))
    words = [*(bytes([byte]) for byte in range(256)), b"he", b"the", b" the"]
    listed = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
    about = {"pattern": r"\s?\w+|.", "default_vocab_size": 289, "default_num_special_tokens": 30}
    (path / "tekken.json").write_text(json.dumps({"config": about, "vocab": listed}))
    return path, truth


def test_mistrals_own_layout_is_read(consolidated: tuple[Path, PreTrainedModel]) -> None:
    path, truth = consolidated
    for tier in ("none", "disk"):
        assert torch.equal(logits_of(offload.load(path, tier), PROMPT), logits_of(truth, PROMPT)), tier
    assert called(offload.open_folder(path).path) == "consolidated"
    assert not describe(path).loads_in_transformers
    tokenizer = AutoTokenizer.from_pretrained(offload.open_folder(path).path)
    assert tokenizer("the the")["input_ids"] == [1, 257 + 30, 258 + 30]
    assert tokenizer.decode([257 + 30, 258 + 30, ord("!") + 30]) == "the the!"
    (path / "consolidated.safetensors").rename(path.parent / "blob")  # as the Hub's cache keeps it
    (path / "consolidated.safetensors").symlink_to(path.parent / "blob")
    assert torch.equal(logits_of(offload.load(path, "disk"), PROMPT), logits_of(truth, PROMPT))


def test_merges_of_a_tekken_file_are_what_merging_by_rank_leaves() -> None:
    """Beside the plain loop, on random words; and of one token that the loop would take minutes for."""
    chance, letters = random.Random(0), [bytes([byte]) for byte in b"abc"]
    for _ in range(200):
        words = [*letters]
        for _ in range(40):
            word = chance.choice(words) + chance.choice(words)
            words += [word] * (word not in words and len(word) < 20)
        chance.shuffle(words)
        ranks = {word: rank for rank, word in enumerate(words)}
        for word in words:
            assert len(word) == 1 or two_parts(word, ranks) == plainly_merged(word, ranks)
    powers = [b"a" * (1 << power) for power in range(16)]
    ranks = {word: rank for rank, word in enumerate(powers)}
    assert two_parts(powers[-1], ranks) == [powers[-2]] * 2


def plainly_merged(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(one + other, len(ranks)), at) for at, (one, other) in enumerate(pairwise(parts))]
        rank, at = min(pairs)
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_what_is_not_known_of_mistrals_own_layout_is_refused_by_name(
    consolidated: tuple[Path, PreTrainedModel],
) -> None:
    path, _ = consolidated
    params = (path / "params.json").read_text()
    for name, given in {"moe": {"num_experts": 8}, "vision_encoder": {}, "quantization": {}, "yarn": {}}.items():
        change(path / "params.json", **{name: given})
        assert name in refusal(path).what
        (path / "params.json").write_text(params)
    wrong: dict[str, object] = {"n_heads": 0, "n_kv_heads": 2.0, "rope_theta": "1e4", "sliding_window": [8, None]}
    for name, number in wrong.items():
        change(path / "params.json", **{name: number})
        assert f"{name} is {number!r}" in refusal(path).what
        (path / "params.json").write_text(params)
    (path / "tekken.json").write_text(json.dumps({"config": {}, "vocab": []}))
    assert "tekken.json cannot be read: default_num_special_tokens is None" in refusal(path).what
    (path / "tekken.json").unlink()
    assert "neither tekken.json nor tokenizer.json" in refusal(path).what


def test_what_modelopt_and_mlx_quantised_otherwise_is_refused_by_name(folder: Callable[[str], Path]) -> None:
    single = folder("single")
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ"}}
    (single / "hf_quant_config.json").write_text(json.dumps(told))
    assert "is quantised with modelopt (W4A8_AWQ)" in refusal(single).what
    (single / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    offload.load(single, "none")
    change(single / "config.json", quantization={"group_size": 64, "bits": 4, "mode": "mxfp4"})
    assert "is quantised with MLX" in refusal(single).what


@pytest.mark.parametrize("name", ["k_scale", "attn.v_scale", "k_proj.k_scale", "kv_scale"])
def test_scales_of_an_8_bit_cache_are_left_out_and_said(
    name: str, folder: Callable[[str], Path], made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single = folder("single")
    tensors = load_file(single / SINGLE)
    tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(1)
    save_file(tensors, single / SINGLE)
    expected = logits_of(offload.load(made / "single", "none"), PROMPT)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits_of(offload.load(single, "none"), PROMPT), expected)
    assert "1 scales of an 8-bit cache are left out" in caplog.text


def test_an_adapter_beside_whole_weights_is_not_applied_and_said(folder: Callable[[str], Path]) -> None:
    single = folder("single")
    (single / "adapter_config.json").write_text("{}")
    offload.load(single, "none")
    assert "is not applied" in str(offload.open_folder(single).notes)


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
