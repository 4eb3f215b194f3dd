"""Checkpoints that see or hear as well: their language model streams, and writes what transformers' whole class writes.

Each is tiny, random, in float32, saved by transformers' own class for images and text; under the names that
`save_pretrained` gives, and under those of published repositories where they differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import offload
from offload.checkpoint.headers import open_folder
from offload.errors import UnsupportedModel
from offload.hub.local_models import describe
from offload.packs.pack import pack, plan
from offload.units import size
from specexec.compose.gate import admit
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.architecture import can_branch
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.tiny import LAYERS, VOCABULARY, in_float32, logits_of
from tests.writing import greedy, prompt, write
from tests.zoo import tiny_of

WRAPPERS = [
    "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen2_5_vl", "gemma3", "mistral3", "llama4", "glm4v_moe",
]  # fmt: skip
# The ids of images and sounds are the last ones: a wrapper reads those as places for what is not there.
TEXTS = [prompt(length, seed=length, most=240) for length in (1, 40)]
PROMPT = torch.tensor([prompt(20, most=240)])
# What save_pretrained writes, and what repositories have instead.
PUBLISHED: dict[str, dict[str, str]] = {
    "gemma3": {r"^language_model\.model\.": "model.language_model.", r"^vision_tower\.": "model.vision_tower."},
    "mistral3": {r"^language_model\.model\.": "model.language_model."},
    "qwen2_5_vl": {r"^model\.": "model.language_model.", r"^visual\.": "model.visual."},
    "kimi_k25": {r"^language_model\.model\.blocks\.": "language_model.model.layers."},
}


def renamed(folder: Path, patterns: dict[str, str]) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        for pattern, wanted in patterns.items():
            if re.search(pattern, name):
                name = re.sub(pattern, wanted, name)
                break
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_text_is_that_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    truth = tiny_of(model_type, tmp_path)
    expected = [greedy(truth, tokens, 12) for tokens in TEXTS]
    model = offload.load(tmp_path, "disk")
    assert offload.stream_of(model).layers == LAYERS
    torch.testing.assert_close(logits_of(model, PROMPT), logits_of(truth, PROMPT), atol=1e-5, rtol=0)
    design = admit(open_folder(tmp_path), trees=False)
    if can_branch(design.model_class, design.config):
        drafter = SiblingDrafter(TreeLM(offload.load(tmp_path, "none")), VOCABULARY)
        written = write(TreeLM(model), drafter, TEXTS, SamplingParams(temperature=0.0, max_tokens=12))
    else:
        written = write(ChainLM(model), NoDrafter(), TEXTS, SamplingParams(temperature=0.0, max_tokens=12), budget=0)
    assert [sequence.answer for sequence in written] == expected


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_names_are_read_as_repositories_have_them(model_type: str, tmp_path: Path) -> None:
    truth = tiny_of(model_type, tmp_path)
    renamed(tmp_path, PUBLISHED[model_type])
    torch.testing.assert_close(
        logits_of(offload.load(tmp_path, "none"), PROMPT), logits_of(truth, PROMPT), atol=1e-5, rtol=0
    )


def test_settings_that_lie_flat_or_leave_defaults_out_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    truth = tiny_of("qwen2_5_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}))
    folder = open_folder(tmp_path)
    assert (folder.model_type, folder.config["num_hidden_layers"]) == ("qwen2_5_vl_text", LAYERS)
    torch.testing.assert_close(
        logits_of(offload.load(tmp_path, "none"), PROMPT), logits_of(truth, PROMPT), atol=1e-5, rtol=0
    )
    tiny_of("gemma3", tmp_path / "gemma")
    config = json.loads((tmp_path / "gemma" / "config.json").read_text())
    del config["text_config"]["num_attention_heads"]  # as Gemma 3 is published
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config))
    assert open_folder(tmp_path / "gemma").config["num_attention_heads"] == 8


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_pack_holds_the_whole_model_and_streams_its_text(quant: str, tmp_path: Path) -> None:
    truth = tiny_of("qwen3_vl", tmp_path / "original")
    made = plan(open_folder(tmp_path / "original"), "nf4" if quant == "nf4" else "none")
    pack(made, tmp_path / "pack")
    whole = json.loads((tmp_path / "original" / "config.json").read_text())
    written = json.loads((tmp_path / "pack" / "config.json").read_text())
    written.pop("quantization_config", None)
    assert written == whole
    original, packed = open_folder(tmp_path / "original"), open_folder(tmp_path / "pack")
    assert packed.beside.keys() == original.beside.keys() != set()
    assert sum(name.startswith("layer-") for name in (shard.file for shard in made.shards)) == LAYERS
    ours = logits_of(offload.load(tmp_path / "pack", "disk"), PROMPT)
    reference = in_float32(type(truth).from_pretrained(tmp_path / "pack", dtype=torch.float32, device_map="cpu"))
    torch.testing.assert_close(ours, logits_of(reference, PROMPT), atol=1e-4, rtol=1e-4)
    if quant == "none":
        torch.testing.assert_close(ours, logits_of(truth, PROMPT), atol=1e-5, rtol=0)


def test_what_stays_on_disk_is_said_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_of("qwen3_vl", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    seen_B = sum(tensor.nbytes for name, tensor in stored.items() if ".visual." in name)
    here = describe(tmp_path)
    assert (here.architecture, here.layers) == ("qwen3_vl", LAYERS)
    note = f"{size(seen_B)} for images and sound stay on disk"
    assert here.notes == (note,)
    command = CommandLine(capsys, monkeypatch, FakeEngine())
    ran = command("plan", str(tmp_path), "--gpu", "none", "--json", "--offload", "none")
    ran = command("plan", str(tmp_path), "--gpu", "none", "--json") if ran.code else ran
    told = json.loads(ran.out)
    assert told["notes"] == [note]
    text_B = sum(tensor.nbytes for name, tensor in stored.items() if ".visual." not in name)
    assert abs(told["weights_B"] - text_B) < 4096
    assert note in command("models", "show", str(tmp_path)).out


def test_a_language_model_that_is_not_known_alone_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    save_file({"language_model.model.layers.0.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "vision_config": {}})
    )
    with pytest.raises(UnsupportedModel, match="'MllamaForConditionalGeneration' is not supported"):
        offload.load(tmp_path, "disk")
