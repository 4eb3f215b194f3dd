"""`specexec pack` writes a model that -m understands, says what it did, and leaves stdout to answers."""

from pathlib import Path

import pytest

import offload
import specexec
from offload.checkpoint.manifest import verify
from specexec import SamplingParams
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


def test_a_packed_demo_writes_the_same_text_with_any_drafter_and_placement(
    command: CommandLine, tmp_path: Path
) -> None:
    ran = command("pack", "demo", "--quant", "nf4", "--out", str(tmp_path / "pack"))
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert "sha256 in" in ran.err
    assert "originals are kept" in ran.err
    assert verify(tmp_path / "pack") == []
    assert "quantization_config" in (tmp_path / "pack" / "config.json").read_text()
    small = str(offload.resolve("demo", ("sibling",)).drafters[0])
    texts = set()
    for tier, drafter, budget in (("none", "none", 0), ("ram", small, 4), ("disk", small, 32), ("disk", "ngram", 16)):
        with specexec.load(str(tmp_path / "pack"), drafter=drafter, offload=tier, budget=budget) as engine:
            sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=7)
            texts.add(engine.generate("List the seasons.", sampling).text)
    assert len(texts) == 1, texts


def test_a_dry_run_writes_nothing(command: CommandLine, tmp_path: Path) -> None:
    ran = command("pack", "demo", "--out", str(tmp_path / "pack"), "--dry-run")
    assert ran.code == 0
    assert ran.out.startswith("would write ")
    assert not (tmp_path / "pack").exists()


def test_a_folder_with_other_things_in_it_is_refused(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ran = command("pack", "demo", "--out", str(tmp_path))
    assert ran.code == 9
    assert "is not empty (notes.txt …)" in ran.err
