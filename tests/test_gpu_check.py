"""The check for machines with a GPU, walked on a CPU: it goes on where it was stopped, and stops in time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import gpu_check
from inflation import Shape
from sparse_model import weights_of, write_sparse

import offload
from tests.tiny import logits_of

CHECKS = ["machine", "link", "copies", "sweeps under 8 GB"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks that were run, in this process."""
    names: list[str] = []

    def run(command: list[str], most_s: float) -> gpu_check.Record:
        name = command[-1]
        if most_s < 1:
            return {"failed": "no time"}
        names.append(name)
        setting = gpu_check.Setting("cpu", True, {})
        return json.loads(json.dumps(gpu_check.CHECKS[name][1](setting)))

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "CHECKS", {name: gpu_check.CHECKS[name] for name in CHECKS})
    return names


def check(out: Path, *more: str) -> str:
    done = CliRunner().invoke(gpu_check.main, ["--device", "cpu", "--tiny", "--out", str(out), *more])
    assert done.exit_code == 0, done.output
    return done.output


def test_checks_that_are_in_the_file_are_not_run_again(ran: list[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    check(out, "--minutes", "0")
    assert ran == []
    assert all("failed" in record for record in json.loads(out.read_text()).values())
    said = check(out)
    assert ran == CHECKS
    found = json.loads(out.read_text())
    assert [*found] == CHECKS
    assert found["sweeps under 8 GB"]["16 rows"]["s"] > 0
    assert "16 rows" in said
    check(out)
    assert ran == [*CHECKS, "machine"], "the machine is asked for each time"
    found["machine"]["torch"] = "1.0"
    out.write_text(json.dumps(found))
    check(out)
    assert ran == [*CHECKS, "machine", *CHECKS], "with another torch everything is measured again"


def test_a_check_that_dies_or_hangs_costs_itself() -> None:
    assert "boom" in str(gpu_check.run([sys.executable, "-c", "raise SystemExit('boom')"], 20)["failed"])
    assert "not done after 1 s" in str(
        gpu_check.run([sys.executable, "-c", "import time; time.sleep(9)"], 1.2)["failed"]
    )
    assert "no time" in str(gpu_check.run(["nothing"], 0.0)["failed"])


def test_a_sparse_model_has_its_size_in_names_and_takes_no_disk(tmp_path: Path) -> None:
    shape = Shape(hidden=512, layers=2, heads=8, kv_heads=2, head_dim=64, ff=1024, tied=False)
    write_sparse(tmp_path, shape, 256)
    files = [*tmp_path.glob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) > weights_of(shape) / 2
    assert sum(file.stat().st_blocks * 512 for file in files) < weights_of(shape) / 4
    model = offload.load(tmp_path, "disk", dtype="bf16")
    assert torch.isfinite(logits_of(model, torch.arange(4)[None])).all()
    offload.stream_of(model).close()
