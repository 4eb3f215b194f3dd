"""Code that a checkpoint brings: never run without --trust-remote-code, and held to every promise with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
import specexec
from cli.app import main
from offload.checkpoint.remote_code import code_files
from offload.errors import RemoteCode, UnsupportedModel
from specexec.compose.load import encoding_in, encoding_of
from specexec.errors import UnsupportedArchitecture
from specexec.model import architecture, remote_code_check
from specexec.sampling.params import SamplingParams
from tests.own_code import change, own_code
from tests.pictured import tokenizer
from tests.tiny import greedy
from tests.zoo import tiny_of

PROMPT = "How does specexec work?"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "own"


def written_by_transformers(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = encoding_in(folder, True).encode(PROMPT)
    found: list[int] = greedy(model, torch.tensor([tokens]), GREEDY.max_tokens)[0, len(tokens) :].tolist()
    return found


def test_without_the_flag_nothing_of_it_runs_and_the_error_names_flag_and_risk(folder: Path) -> None:
    witness = own_code(folder)
    with pytest.raises(RemoteCode) as refusal:
        specexec.load(str(folder))
    assert "configuration_own.py, modeling_own.py" in refusal.value.what
    assert "can do all that you can" in str(refusal.value.why)
    assert "--trust-remote-code" in str(refusal.value.hint)
    assert not witness.exists()


@pytest.mark.parametrize(("drafter", "offloaded"), [("none", "ram"), ("ngram", "disk"), ("skip", "none")])
def test_with_the_flag_it_writes_what_transformers_writes(
    folder: Path, drafter: str, offloaded: offload.Offload
) -> None:
    witness = own_code(folder)
    with specexec.load(
        str(folder), drafter=drafter, offload=offloaded, budget=16, dtype="f32", trust_remote_code=True
    ) as llm:
        assert llm.own_code
        assert list(llm.generate(PROMPT, GREEDY).tokens) == written_by_transformers(folder)
    assert witness.exists()


@pytest.mark.parametrize("kind", ["closed", "counting"])
def test_what_cannot_branch_is_refused_by_name_and_streams_without_a_drafter(folder: Path, kind: str) -> None:
    own_code(folder, kind)
    with pytest.raises(UnsupportedArchitecture, match=f"'own-{kind}' cannot verify trees") as refusal:
        specexec.load(str(folder), drafter="ngram", trust_remote_code=True)
    assert "--drafter none" in str(refusal.value.hint)
    with specexec.load(str(folder), drafter="none", offload="disk", dtype="f32", trust_remote_code=True) as llm:
        assert list(llm.generate(PROMPT, GREEDY).tokens) == written_by_transformers(folder)


def test_code_that_mixes_neighbours_is_caught_before_it_writes_a_word(folder: Path) -> None:
    own_code(folder, "leaky")
    with pytest.raises(UnsupportedArchitecture, match="computes something else in a tree"):
        specexec.load(str(folder), drafter="ngram", trust_remote_code=True)
    with pytest.raises(UnsupportedArchitecture, match="computes something else when it goes on from its cache"):
        specexec.load(str(folder), drafter="none", trust_remote_code=True)


def test_a_model_type_that_was_not_tried_is_tried_before_it_writes_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_of("moshi", tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(architecture, "NO_TREES", {})
    (tmp_path / "none.txt").touch()
    monkeypatch.setattr(remote_code_check, "TRIED", tmp_path / "none.txt")
    with pytest.raises(UnsupportedArchitecture, match="'moshi' cannot verify trees: its code computes something else"):
        specexec.load(str(tmp_path), drafter="ngram")


def test_the_trial_leaves_room_for_rounding(folder: Path) -> None:
    own_code(folder, dtype=torch.bfloat16)
    with specexec.load(str(folder), drafter="ngram", trust_remote_code=True) as llm:
        assert llm.generate(PROMPT, GREEDY).tokens


def test_code_that_fails_is_a_refusal_with_its_words(folder: Path) -> None:
    own_code(folder, "broken")
    with pytest.raises(UnsupportedModel, match="does not work here") as refusal:
        specexec.load(str(folder), trust_remote_code=True)
    assert "flash_own" in str(refusal.value.why)


def test_code_of_another_repository_is_refused_even_with_the_flag(folder: Path) -> None:
    own_code(folder)
    elsewhere = {"AutoConfig": "somebody/else--configuration_own.OwnConfig"}
    change(folder / "config.json", auto_map=elsewhere)
    with pytest.raises(RemoteCode, match="another repository, somebody/else"):
        specexec.load(str(folder), trust_remote_code=True)


def test_a_tokenizer_of_its_own_needs_the_flag_too(folder: Path, tmp_path: Path) -> None:
    own_code(folder)
    witness = tmp_path / "tokenizer.ran"
    (folder / "tokenization_own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(witness)!r}).write_text('')\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    owned = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=owned)
    with pytest.raises(RemoteCode, match=r"tokenization_own\.py"):
        encoding_of(str(folder))
    assert not witness.exists()
    tokens = encoding_of("demo").encode(PROMPT)
    assert encoding_of(str(folder), trust_remote_code=True).encode(PROMPT) == tokens
    assert witness.exists()


def test_code_that_is_not_needed_is_left_alone(folder: Path) -> None:
    """Many models bring code from before transformers knew them: its own is taken, and the text is the same."""
    witness = own_code(folder)
    change(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with specexec.load(str(folder), drafter="none") as llm:
        assert not llm.own_code
    assert not witness.exists()


def test_a_pack_takes_the_code_along_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_code(folder)
    out = tmp_path / "packed"
    assert main(["pack", str(folder), "--quant", "none", "--out", str(out), "--offline"]) == 4
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["pack", str(folder), "--quant", "none", "--out", str(out), "--trust-remote-code", "-q"]) == 0
    assert code_files(out) == ["configuration_own.py", "modeling_own.py"]
    with specexec.load(str(out), drafter="none", dtype="f32", trust_remote_code=True) as llm:
        assert list(llm.generate(PROMPT, GREEDY).tokens) == written_by_transformers(folder)


def test_the_command_line_says_it_in_words_and_in_json(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_code(folder)
    asking = ["generate", "-p", PROMPT, "-m", str(folder), "-d", "none", "-n", "4", "--raw"]
    assert main([*asking, "--json", "-q"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "remote_code"
    monkeypatch.setenv("SPECEXEC_GENERATE_TRUST_REMOTE_CODE", "1")
    assert main(asking) == 0
    assert "computed by the model's own code" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["trust_remote_code = true", '[chat]\nnotify_command = "touch caught"'])
def test_a_folder_that_another_user_filled_cannot_give_trust(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specexec.toml").write_text(line)
    assert main(["chat", "-p", "x"]) == 2
    assert "only your own settings file may say so" in capsys.readouterr().err
