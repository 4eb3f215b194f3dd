"""LoRA adapters are added to the weights as peft merges them, wherever the layers are; others are refused by name."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import PreTrainedModel

import offload
import specexec
from cli.app import commands
from offload.checkpoint.documents import Json
from offload.checkpoint.headers import open_folder
from offload.checkpoint.lora import WEIGHTS, open_adapter, with_adapters
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import Quant
from offload.checkpoint.quantized.stored import fold
from offload.checkpoint.tensors import DTYPES, load_entry
from offload.errors import BadModelDir, OffloadError, UnsupportedModel
from offload.hub.adapters import adapters_digest
from offload.machine.memory import Free
from offload.model import load
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.placement.requirements import need_of
from offload.stream.products import add
from offload.units import GiB
from specexec.errors import BadDrafter
from tests.adapters import Halves, adapter
from tests.quantised_files import add_tokenizer
from tests.simulated.device import DEVICE, Simulator
from tests.tiny import logits_of, tiny

RECORDED = Path(__file__).parent / "recorded" / "adapters"
PROMPT = torch.arange(2, 32)[None]
TIERS: tuple[Offload, ...] = ("none", "ram", "disk")


@pytest.mark.parametrize("name", ["plain", "bf16", "patterns"])
def test_a_weight_becomes_what_peft_makes_of_it(name: str) -> None:
    weights = load_file(RECORDED / name / "weights.safetensors")
    adapter = open_adapter(str(RECORDED / name))
    assert len(adapter.changes) == 4
    for change in adapter.changes:
        a, b = (load_entry(entry, DTYPES[entry.dtype]) for entry in (change.a, change.b))
        weight = weights[f"before/{change.name}"]
        add(weight, [(b, a, change.scale)])
        assert torch.equal(weight, weights[f"after/{change.name}"]), change.name


def shapes_of(model: PreTrainedModel, *ends: str) -> dict[str, tuple[int, int]]:
    named = model.named_parameters()
    return {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in named
        if name.removesuffix(".weight").endswith(ends)
    }


def merge(model: PreTrainedModel, made: Mapping[str, Halves], scale: float) -> None:
    """As one reads in a book."""
    with torch.no_grad():
        for name, (b, a) in made.items():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(weight + (b @ a) * scale)


ENDS = ("q_proj", "v_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "whole"
    tiny("llama", path)
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def one(whole: Path) -> Path:
    adapter(whole.with_name("one"), shapes_of(offload.load(whole), *ENDS))
    return whole.with_name("one")


def test_a_model_computes_with_the_merged_weights_wherever_its_layers_are(whole: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "same")
    shapes = shapes_of(model, *ENDS)
    assert len(shapes) == 13
    norm = torch.rand(64) + 0.5
    first = adapter(tmp_path / "first", shapes, more={"model.norm.weight": norm}, config={"modules_to_save": ["norm"]})
    second = adapter(
        tmp_path / "second",
        {name: shapes[name] for name in shapes if "q_proj" in name},
        r=7,
        config={"use_rslora": True},
    )
    merge(model, first, 2.0)
    merge(model, second, 8 / 7**0.5 * 0.5)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").copy_(norm)
    asked = [str(tmp_path / "first"), f"{tmp_path / 'second'}:0.5"]
    plain = logits_of(offload.load(whole), PROMPT)
    for tier in TIERS:
        ours = offload.load(whole, tier, adapters=asked)
        for _ in range(2):  # nothing is added twice
            assert torch.equal(logits_of(ours, PROMPT), logits_of(model, PROMPT)), tier
        offload.stream_of(ours).close()
    assert not torch.equal(logits_of(model, PROMPT), plain)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_weights_in_few_bits_are_changed_when_they_are_dequantised(
    quant: Quant, whole: Path, one: Path, tmp_path: Path
) -> None:
    """The head in four bits too, which becomes dense then."""
    pack(plan(open_folder(whole), quant, head="nf4"), tmp_path / "pack")
    packed = open_folder(tmp_path / "pack")
    model = tiny("llama", tmp_path / "same")
    with torch.no_grad():
        for name, weight in fold(packed).quantised.items():
            held = {role: load_entry(entry, DTYPES[entry.dtype]) for role, entry in weight.members.items()}
            dequantise(weight, held, model.get_parameter(name))
    merge(model, adapter(one, shapes_of(model, *ENDS)), 2.0)
    for tier in TIERS:
        ours = offload.load(tmp_path / "pack", tier, adapters=[str(one)])
        for _ in range(2):
            assert torch.equal(logits_of(ours, PROMPT), logits_of(model, PROMPT)), tier
        offload.stream_of(ours).close()


def test_the_others_still_compute_in_integers(whole: Path, one: Path, tmp_path: Path) -> None:
    pack(plan(open_folder(whole), "int8"), tmp_path / "pack")
    ours = [
        offload.load(tmp_path / "pack", tier, compute=compute, adapters=[str(one)], ctx=64)
        for tier in TIERS
        for compute in ("int8", "float")
    ]
    logits = [logits_of(model, PROMPT) for model in ours]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[0], logits[4])
    assert not torch.equal(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[1], atol=0.05)
    streams = [offload.stream_of(model) for model in ours[:2]]
    assert not streams[0].in_integers
    whole_B, half_B = (stream.placement.need.dense_B for stream in reversed(streams))
    assert 0 < half_B < whole_B
    folder = with_adapters(open_folder(tmp_path / "pack"), [str(one)])
    assert need_of(folder, 4, 64, compute="int8").dense_B == half_B


def test_a_plan_counts_what_travels_with_the_layers(whole: Path, one: Path) -> None:
    bare, changed = open_folder(whole), with_adapters(open_folder(whole), [str(one), f"{one}:0.5"])
    placement = offload.stream_of(offload.load(whole, "disk", ctx=64, adapters=[str(one), f"{one}:0.5"])).placement
    need = need_of(changed, 4, 64)
    assert need.read_B == placement.need.read_B
    assert need.passing_B == placement.need.passing_B > 0
    assert all(a >= b for a, b in zip(need.layers_B, placement.need.layers_B, strict=True))
    in_layers_B = sum(
        2 * (one.a.nbytes + one.b.nbytes) for one in open_adapter(str(one)).changes if "layers" in one.name
    )
    assert need.disk_B - need_of(bare, 4, 64).disk_B == in_layers_B


def test_on_a_device_the_sum_is_made_there(whole: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device, *_: Free(8 * GiB, None if device == "cpu" else 8 * GiB))
    expected = logits_of(offload.load(whole, adapters=[str(one)]), PROMPT)
    found: list[torch.Tensor] = []
    with Simulator(seed=1, late=True) as simulator:
        for tier in TIERS:
            model = offload.load(whole, tier, str(DEVICE), "f32", adapters=[str(one)])
            found += [model(PROMPT.to(DEVICE)).logits.cpu() for _ in range(2)]
            offload.stream_of(model).close()
    assert simulator.races == []
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.allclose(found[0], expected, atol=1e-4)


REFUSED: list[tuple[dict[str, Json], str]] = [
    ({"peft_type": "IA3"}, "an adapter whose peft_type is IA3, not LoRA"),
    ({"use_dora": True}, "trained with use_dora = true"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters = "),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"something_of_2027": {"x": 1}}, "something_of_2027"),
    ({"bias": "lora_only"}, "changes biases too"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changed the base model"),
]


@pytest.mark.parametrize(("config", "says"), REFUSED)
def test_what_is_not_added_as_it_was_trained_is_refused_by_name(
    config: dict[str, Json], says: str, tmp_path: Path
) -> None:
    adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (64, 64)}, config=config)
    with pytest.raises(UnsupportedModel) as refusal:
        open_adapter(str(tmp_path))
    assert says in refusal.value.what
    assert "merge_and_unload" in str(refusal.value.hint)


WRONG: list[tuple[dict[str, tuple[int, int]], dict[str, torch.Tensor], str]] = [
    ({"model.layers.0.self_attn.magic": (64, 64)}, {}, "changes 'model.layers.0.self_attn.magic.weight'"),
    ({"model.layers.9.self_attn.q_proj": (64, 64)}, {}, "changes 'model.layers.9.self_attn.q_proj.weight'"),
    ({"model.layers.0.self_attn.q_proj": (64, 63)}, {}, r"q_proj.weight' \[64, 63\]"),
    ({}, {"lm_head.weight": torch.zeros(300, 64)}, r"the model's own is F32 \[256, 64\]"),
    ({}, {"score.weight": torch.zeros(2, 64)}, "replaces 'score.weight', which the model does not store"),
    ({}, {"model.embed_tokens.lora_embedding_A": torch.zeros(2, 64)}, "no LoRA of a linear layer"),
]


@pytest.mark.parametrize(("shapes", "more", "says"), WRONG)
def test_an_adapter_of_another_model_is_refused_by_name(
    shapes: dict[str, tuple[int, int]], more: dict[str, torch.Tensor], says: str, whole: Path, tmp_path: Path
) -> None:
    adapter(tmp_path, shapes, more=more)
    with pytest.raises(UnsupportedModel, match=says):
        offload.load(whole, adapters=[str(tmp_path)])


def test_headers_alone_tell_that_an_adapter_is_of_another_model(whole: Path, tmp_path: Path) -> None:
    shapes = {"layers.0.self_attn.q_proj": (64, 63), "layers.9.self_attn.q_proj": (64, 64)}
    says = (r"\[64, 63\], which the model has as \[64, 64\]", "of a layer that the model does not have")
    for (module, shape), words in zip(shapes.items(), says, strict=True):
        adapter(tmp_path, {f"model.{module}": shape})
        with pytest.raises(UnsupportedModel, match=words):
            with_adapters(open_folder(whole), [str(tmp_path)])


def test_a_head_that_is_tied_is_refused(tmp_path: Path) -> None:
    tiny("llama_tied", tmp_path / "tied")
    adapter(tmp_path / "head", {"lm_head": (256, 64)})
    with pytest.raises(UnsupportedModel, match=r"'lm_head.weight'") as refusal:
        offload.load(tmp_path / "tied", adapters=[str(tmp_path / "head")])
    assert "tied to the embeddings" in str(refusal.value)
    adapter(tmp_path / "saved", {}, more={"model.embed_tokens.weight": torch.zeros(256, 64)})
    with pytest.raises(UnsupportedModel, match="the model's head as well"):
        offload.load(tmp_path / "tied", adapters=[str(tmp_path / "saved")])


def test_what_is_no_adapter_or_damaged_is_said(one: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModelDir, match=r"adapter_config.json is not there"):
        open_adapter(f"{tmp_path}:0.5")
    with pytest.raises(BadModelDir, match="no number to multiply with"):
        open_adapter(f"{tmp_path}/x:inf")
    shutil.copytree(one, tmp_path / "other")
    config = json.loads((one / "adapter_config.json").read_text())
    for changed, says in (
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"(": 1}}, "'\\(' is no pattern"),
    ):
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(OffloadError, match=says):
            open_adapter(str(tmp_path / "other"))
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / "other" / "adapter_model.bin")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelDir, match="pickle"):
        open_adapter(str(tmp_path / "other"))


def test_target_and_drafter_have_adapters_of_their_own(whole: Path, one: Path) -> None:
    sampling = specexec.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    asked = (f"{one}:3",)
    with specexec.load(str(whole), drafter="none", lora=asked) as plain:
        expected = plain.generate("w5 w6 w7", sampling).tokens
    sweeps = {}
    for drafter_lora in ((), asked):
        with specexec.load(str(whole), drafter=str(whole), lora=asked, drafter_lora=drafter_lora) as engine:
            answer = engine.generate("w5 w6 w7", sampling)
            assert answer.tokens == expected
            assert engine.adapters == {"target": asked, "drafter": drafter_lora}
            sweeps[drafter_lora] = answer.sweeps
    assert sweeps[asked] < sweeps[()]  # its guesses are the target's own choices
    with specexec.load(str(whole), drafter="none") as bare:
        assert bare.generate("w5 w6 w7", sampling).tokens != expected
    with pytest.raises(BadDrafter, match="none drafts here"):
        specexec.load(str(whole), drafter="ngram", drafter_lora=asked)


def test_the_command_line_names_them(whole: Path, one: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    planned = run(commands, ["plan", str(whole), "--lora", str(one), "--offline"])
    assert planned.exit_code == 0, planned.output
    assert f" --lora {one}" in planned.output
    typed = ["generate", "-m", str(whole), "-d", "none", "-t", "0", "-n", "4", "--raw", "-p", "w5 w6"]
    answers = [
        run(commands, [*typed, "-o", str(tmp_path / f"{number}.jsonl"), *more])
        for number, more in enumerate(([], ["--lora", str(one)], ["--lora", f"{one}:0.5"]))
    ]
    assert [one.exit_code for one in answers] == [0, 0, 0], answers[1].output
    assert f"LoRA {one}:0.5" in answers[2].output
    records = [json.loads((tmp_path / f"{number}.jsonl").read_text().splitlines()[0]) for number in range(3)]
    assert len({record["model"] for record in records}) == 3
    again = run(commands, [*typed, "-o", str(tmp_path / "1.jsonl"), "--resume"])
    assert again.exit_code != 0
    assert adapters_digest([str(one)]) != adapters_digest([f"{one}:0.5"]) != adapters_digest([]) == ""
