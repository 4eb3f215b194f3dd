"""Every refusal a user can meet, provoked as a user would: its exit code, and that it says what, why and what to try.

Those of the Hub (gated, no network, disk too small for a download) are in test_cli_pull.py, a full disk during a pack
in test_offload_pack.py, a drafter that does not pay in test_auto.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import cli.engine.open
import offload
import specexec
from offload.errors import UnsupportedSystem
from offload.hub.names import demo_folder
from offload.machine.memory import Free
from offload.placement.solver import place
from offload.units import GiB
from tests.command_line import CommandLine, Ran
from tests.fake_engine import FakeEngine
from tests.test_offload_placement import BIG

open_engine = cli.engine.open.open_engine


@pytest.fixture
def faked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo that may be damaged."""
    return Path(shutil.copytree(demo_folder("target"), tmp_path / "model"))


def failing(faked: CommandLine, error: Exception) -> Ran:
    """One question to a model that fails while it is loaded."""

    def crash() -> None:
        raise error

    faked.fail_with(crash)
    return faked("chat", "-p", "x")


def asked(real: CommandLine, *options: str, prompt: str = "x") -> Ran:
    """What came of one question; of the words only the error."""
    ran = real("chat", "-p", prompt, "--offline", *options)
    return Ran(ran.code, ran.out, ran.err[max(0, ran.err.find("Error: ")) :])


def test_model_not_found(real: CommandLine) -> None:
    assert asked(real, "-m", "lama-70b") == Ran(
        3, "",
        "Error: no model named 'lama-70b'.\n"
        "  Not an alias and not a folder; models of the Hub have names like org/name.\n"
        "  Try: llama-70b or llama-8b or llama-1b  (see: specexec models)\n",
    )  # fmt: skip


def test_bad_model_dir(real: CommandLine, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    ran = asked(real, "-m", str(tmp_path))
    assert ran.code == 4
    assert ran.err == (
        f"Error: {tmp_path} holds an ONNX export (a.onnx).\n"
        "  specexec reads safetensors checkpoints with config.json and tokenizer.json, and GGUF files.\n"
        "  Try: a safetensors version of the model.\n"
    )


def test_not_enough_ram(real: CommandLine) -> None:
    ran = asked(real, "--device", "cpu", "--offload", "none", "--ram", "1MiB")
    assert ran.code == 5
    assert "needs " in ran.err
    assert "1.0 MiB" in ran.err
    assert "\n  Try: " in ran.err


@pytest.mark.parametrize(("drafter", "left_out"), [("sibling", True), ("none", False)])
def test_a_drafter_model_that_takes_the_ram_may_be_left_out(real: CommandLine, drafter: str, left_out: bool) -> None:
    ran = asked(real, "--device", "cpu", "--offload", "disk", "--ram", "1MiB", "--drafter", drafter)
    assert ran.code == 5
    assert ("--drafter ngram" in ran.err) == left_out


def test_not_enough_vram(faked: CommandLine) -> None:
    def refuse() -> None:
        place(BIG, Free(64 * GiB, 3 * GiB), "disk")

    faked.fail_with(refuse)
    ran = faked("chat", "-p", "x")
    assert ran.code == 5
    assert "GPU memory" in ran.err
    assert "3.0 GiB" in ran.err
    assert "\n  Try: " in ran.err


def test_offline_missing(real: CommandLine) -> None:
    ran = asked(real, "-m", "llama-70b")
    assert ran.code == 3
    assert " is not in the local cache (" in ran.err
    assert ", and nothing is downloaded now.\n" in ran.err
    assert ", or the same command without --offline.\n" in ran.err


def test_tokenizer_mismatch(real: CommandLine, tmp_path: Path) -> None:
    small = Path(shutil.copytree(demo_folder("drafter"), tmp_path / "small"))
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = asked(real, "-d", str(small))
    assert ran.code == 4
    assert f"Error: drafter {small} does not share the model's vocabulary, and its tokenizer changes text (" in ran.err
    assert " comes back as " in ran.err
    assert "\n  Try: --drafter none" in ran.err


def test_corrupt_shard(real: CommandLine, model: Path) -> None:
    (shard,) = model.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    ran = asked(real, "-m", str(model))
    assert ran.code == 4
    assert f"{shard.name} is damaged" in ran.err
    assert f"file has {shard.stat().st_size}." in ran.err
    assert "\n  Try: " in ran.err


def test_unsupported_system(real: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    for ran in (asked(real), real("plan", "demo"), real("--help")):
        assert ran.code == 6
        assert ran.err.startswith("Error: specexec runs on Linux and on WSL2; this is Darwin.")
        assert "\n  Try: on Windows: wsl --install" in ran.err
    with pytest.raises(UnsupportedSystem):
        specexec.load("demo")
    with pytest.raises(UnsupportedSystem):
        offload.load(demo_folder("target"))


@pytest.mark.parametrize(("option", "allowed"), [("-d", "300000"), ("-v", "900000")])
def test_a_limit_under_which_nothing_can_be_imported(option: str, allowed: str) -> None:
    python = "import sys; from cli.app import main; sys.exit(main(['plan', 'demo']))"
    command = f'ulimit {option} {allowed}; {sys.executable} -c "{python}"'
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 5, ran.stderr
    assert ran.stderr.startswith("Error: the shell allows a process ")
    assert f"\n  Try: ulimit {option} unlimited" in ran.stderr


def test_no_gpu(real: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for more in ([], ["--vram", "4GiB"]):
        ran = asked(real, "--device", "cuda", *more)
        assert ran.code == 6
        assert ran.err.startswith("Error: --device cuda was asked for, but ")
        assert "\n  Try: " in ran.err


def test_unsupported_arch(real: CommandLine, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3"}}))
    ran = asked(real, "-m", str(model))
    assert ran.code == 4
    assert f"Error: {model} is quantised with exl3, which cannot be streamed.\n" in ran.err
    assert "\n  Try: the 16-bit version of the model" in ran.err


def test_context_length_exceeded(real: CommandLine) -> None:
    ran = asked(real, prompt="word " * 3000)
    assert ran.code == 7
    assert "tokens, the context is 2,048.\n  Try: --ctx " in ran.err


def test_empty_prompt(faked: CommandLine) -> None:
    assert faked("chat", "-p", "") == Ran(7, "", "Error: the prompt is empty.\n")


def test_output_exists_manifest_mismatch_and_locked(faked: CommandLine, tmp_path: Path) -> None:
    output = ("-p", "x", "-o", "out.jsonl")
    assert faked("generate", *output, "-t", "0.2").code == 0
    ran = faked("generate", *output)
    assert ran.code == 9
    assert ran.err.startswith("Error: out.jsonl already exists (1 ")
    assert "--resume" in ran.err
    assert "--overwrite" in ran.err
    ran = faked("generate", *output, "-t", "0.7", "--resume")
    assert ran.code == 9
    assert "out.jsonl was made with" in ran.err
    assert "0.2" in ran.err
    assert "0.7" in ran.err
    with FileLock(tmp_path / ".out.jsonl.lock"):
        ran = faked("generate", *output, "-t", "0.2", "--resume")
    assert ran.code == 9
    assert "is writing out.jsonl.\n  Try: another -o, or wait for it.\n" in ran.err


def test_bad_jsonl(faked: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "He said "no"}\n')
    ran = faked("generate", "prompts.jsonl", "-o", "out.jsonl")
    assert ran.code == 8
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (error,) = [record["error"] for record in records if record["error"]]
    assert error["code"] == "bad_jsonl"
    ran = faked("generate", "prompts.jsonl", "-o", "other.jsonl", "--strict")
    assert ran.code == 7
    assert "prompts.jsonl:2: " in ran.err


def test_device_lost(faked: CommandLine) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")
    ran = failing(faked, lost)
    assert ran.code == 6
    assert ran.err.startswith(
        "Error: the GPU stopped answering (CUDA error: an illegal memory access was encountered).\n"
        "  What was finished is on the disk. Try: "
    )


@pytest.mark.parametrize(
    ("refused", "name"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "GPU memory"), (MemoryError("x"), "memory")],
)
def test_memory_that_is_refused_between_layers(refused: Exception, name: str, faked: CommandLine) -> None:
    ran = failing(faked, refused)
    assert ran.code == 5
    assert ran.err.startswith(f"Error: {name} ran out.\n  {refused}\n  Try: fewer guesses (--budget), ")


def test_internal(faked: CommandLine) -> None:
    ran = failing(faked, KeyError("missing"))
    assert ran.code == 1
    assert ran.err.startswith("Internal error in crash(): KeyError: ")
    assert "This is a bug, please report it. Run again with -vv for the traceback.\n" in ran.err
