"""One gate: what `chat` refuses, `plan`, `pull` and `pack` refuse in the same words, before any download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import specexec as library
from offload.checkpoint.headers import open_folder
from offload.errors import OffloadError
from offload.packs.pack import pack, plan
from specexec.compose.gate import admit
from specexec.errors import SpecexecError
from specexec.model.architecture import USUAL, is_usual
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.fake_hub import FakeHub
from tests.test_cli_pull import Pull, aliased, specexec  # noqa: F401  # fixtures
from tests.tiny import FAMILIES, tiny, tiny_config

KINDS: dict[str, dict[str, object]] = {
    "a wrapper": {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "text_config": {}},
    "an unknown type": {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]},
    "an encoder": {"model_type": "t5", "architectures": ["T5Model"]},
    "a method of quantisation": {"quantization_config": {"quant_method": "exl3"}},
    "code of its own": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    "no number of heads": {"num_attention_heads": "four"},
}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


def change(folder: Path, settings: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize("kind", KINDS)
def test_plan_refuses_what_loading_refuses_in_the_same_words(kind: str, tmp_path: Path, command: CommandLine) -> None:
    tiny("llama", tmp_path)
    change(tmp_path, KINDS[kind])
    with pytest.raises((OffloadError, SpecexecError)) as refused:
        library.load(str(tmp_path), offline=True)
    assert isinstance(refused.value, OffloadError | SpecexecError)
    ran = command("plan", str(tmp_path), "--offline")
    assert ran.code != 0
    assert ran.err.startswith(f"Error: {refused.value.what}\n")
    shown = command("models", "show", str(tmp_path))
    assert refused.value.what in shown.out


def test_what_runs_without_guesses_only_is_planned_so(tmp_path: Path, command: CommandLine) -> None:
    tiny("llama", tmp_path)
    change(tmp_path, {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert command("plan", str(tmp_path), "--offline", "-d", "none").code == 0
    with pytest.raises(SpecexecError, match="cannot verify trees") as refused:
        library.load(str(tmp_path), drafter="ngram", offline=True)
    assert command("plan", str(tmp_path), "--offline", "-d", "ngram").err.startswith(f"Error: {refused.value.what}\n")
    planned = command("plan", str(tmp_path), "--offline", "--json")
    assert json.loads(planned.out)["tokens_per_sweep"] == [1, 1]
    assert "Plain decoding: architecture 'llama' cannot verify trees" in command("plan", str(tmp_path), "--offline").out
    assert (
        "without guesses only: architecture 'llama' cannot verify trees" in command("models", "show", str(tmp_path)).out
    )


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        (["-d", "none"], [1, 1]),
        (["-b", "0"], [1, 1]),
        (["-d", "ngram"], [1, 3]),
        (["-d", "auto"], [1, 3]),
        (["-d", "demo"], [5, 10]),
        (["-d", "demo", "-b", "4"], [5, 5]),
    ],
)
def test_a_plan_promises_no_more_tokens_than_its_drafter_can_bring(
    asked: list[str], tokens: list[int], tmp_path: Path, command: CommandLine
) -> None:
    tiny("llama", tmp_path)
    ran = command("plan", str(tmp_path), "--gpu", "none", "--json", *asked)
    record = json.loads(ran.out)
    assert record["tokens_per_sweep"] == tokens
    row = record["rows"][0]
    assert row["tokens_per_s"] == pytest.approx([each / row["sweep_s"] for each in tokens])


def test_usual_models_pass_transformers_own_gate(tmp_path: Path) -> None:
    """What is known by heart here is what transformers says."""
    for family in FAMILIES:
        folder = tmp_path / family
        config = tiny_config(family)
        folder.mkdir()
        config.save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text())
        if not is_usual(told):
            continue
        tiny(family, folder)
        admit(open_folder(folder), trees=True)
    assert {tiny_config(family).model_type for family in FAMILIES} >= USUAL


def test_a_model_that_cannot_run_is_refused_before_its_download(specexec: Pull, hub: FakeHub) -> None:  # noqa: F811
    change(hub.repos["org/big"], KINDS["a wrapper"])
    commands = (["pull", "org/big"], ["pack", "org/big", "--out", "p"], ["plan", "org/big"])
    for arguments in (*commands, ["chat", "-m", "org/big", "-p", "x"]):
        ran = specexec(*arguments)
        assert ran.code == 4, ran.err
        assert "Error: architecture 'MllamaForConditionalGeneration' is not supported." in ran.err
    assert not [name for _, name in hub.sent if name.endswith(".safetensors")]


def test_plan_counts_a_model_in_four_bits_that_is_not_here_as_if_it_were(
    specexec: Pull,  # noqa: F811
    hub: FakeHub,
    command: CommandLine,
    tmp_path: Path,
) -> None:
    tiny("llama", tmp_path / "original", hidden_size=64, intermediate_size=128)
    pack(plan(open_folder(tmp_path / "original"), "nf4"), tmp_path / "packed")
    (tmp_path / "packed" / "manifest.json").unlink()  # as bitsandbytes writes it
    hub.repos["org/four"] = tmp_path / "packed"
    machine = ["--gpu", "8GiB", "--ram", "16GiB", "--vram", "8GiB", "--json", "--all"]
    far = json.loads(specexec("plan", "org/four", *machine).out)
    near = json.loads(command("plan", str(tmp_path / "packed"), *machine).out)
    assert far["weights_B"] == near["weights_B"]
    for one, other in zip(far["rows"], near["rows"], strict=True):
        assert {key: value for key, value in one.items() if key.endswith("_B")} == {
            key: value for key, value in other.items() if key.endswith("_B")
        }
    assert not [name for _, name in hub.sent if name.endswith(".safetensors")]


def test_pulling_again_fetches_what_is_damaged(specexec: Pull, hub: FakeHub) -> None:  # noqa: F811
    assert specexec("pull", "org/big", "-d", "none").code == 0
    here = Path(specexec("pull", "org/big", "-d", "none", "--offline").out.strip())
    hub.sent.clear()
    config = here / "config.json"
    whole = config.read_bytes()
    config.resolve().write_bytes(whole[:50])
    listed = specexec("models", "list")
    assert listed.code == 0, listed.err
    assert "damaged" in listed.out
    ran = specexec("pull", "org/big", "-d", "none")
    assert ran.code == 0, ran.err
    assert "config.json is damaged and is fetched anew" in ran.err
    assert config.read_bytes() == whole
    assert [name for _, name in hub.sent] == ["config.json"]
