"""`specexec models`: what is here, whether it is whole, and how to be rid of it, without loading anything."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from offload.checkpoint.headers import open_folder
from offload.hub.cleanup import QUIET_s
from offload.packs.pack import pack, plan
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.test_cli_pull import Pull, aliased, specexec  # noqa: F401  # fixtures
from tests.tiny import tiny


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny("mixtral", tmp_path / "original")
    pack(plan(open_folder(tmp_path / "original"), "int8"), tmp_path / "pack")
    return tmp_path / "pack"


def test_a_pack_is_shown_with_its_format_and_who_can_load_it(command: CommandLine, packed: Path) -> None:
    facts = json.loads(command("models", "show", str(packed), "--json").out)
    assert (facts["format"], facts["pack"], facts["loads_in_transformers"], facts["layers"]) == ("int8", True, False, 4)
    assert 8 < facts["bits_per_weight"] < 20, "experts and linears in 8 bits, embeddings, the head and norms in 32"
    assert facts["size_B"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    assert "no, its experts are in a layout of specexec's own" in command("models", "show", str(packed)).out
    original = json.loads(command("models", "show", str(packed.parent / "original"), "--json").out)
    assert (original["format"], original["pack"], original["loads_in_transformers"]) == ("f32", False, True)
    assert original["bits_per_weight"] == 32


def test_a_pack_is_verified_and_removed(command: CommandLine, packed: Path) -> None:
    assert command("models", "verify", str(packed)).out == f"{packed}: every hash is right\n"
    shard = packed / "layer-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ran = command("models", "verify", str(packed), "--json")
    assert (ran.code, json.loads(ran.out)["damaged"]) == (4, [shard.name])
    assert "1 file of" in command("models", "verify", str(packed)).err
    assert command("models", "rm", str(packed)).code == 2  # no terminal to confirm at
    ran = command("models", "rm", str(packed), "--yes", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["freed_B"][str(packed)] > 0
    assert not packed.exists()


def test_folders_of_ones_own_are_checked_but_never_removed(command: CommandLine, packed: Path) -> None:
    own = packed.parent / "original"
    assert "there are no hashes to compare" in command("models", "verify", str(own)).out
    ran = command("models", "rm", str(own), "--yes")
    assert ran.code == 4
    assert "is a folder of your own" in ran.err
    assert (own / "config.json").exists()


def test_what_was_pulled_is_listed_found_and_removed(specexec: Pull, tmp_path: Path) -> None:  # noqa: F811
    listed = {row["name"]: row for row in json.loads(specexec("models", "--json").out)}
    assert listed["mine"]["local"] is False
    ran = specexec("models", "path", "mine")
    assert ran.code == 3
    assert "org/big is not in the local cache" in ran.err
    big, small = specexec("pull", "mine").out.splitlines()
    listed = {row["name"]: row for row in json.loads(specexec("models", "list", "--json").out)}
    assert (listed["mine"]["path"], listed["mine"]["format"], listed["mine"]["drafter"]) == (big, "f32", "org/small")
    assert listed["org/small"]["path"] == small
    assert specexec("models", "path", "mine").out == f"{big}\n"
    assert specexec("models", "rm", "mine", "--yes").code == 0
    assert not Path(big).exists()
    assert Path(small).exists()


OLD, PINNED = "a" * 40, "b" * 40


def test_prune_deletes_what_was_left_behind_and_nothing_else(
    specexec: Pull,  # noqa: F811
    tmp_path: Path,
    packed: Path,
) -> None:
    assert json.loads(specexec("models", "prune", "--json").out) == {"found": [], "dry_run": False, "freed_B": 0}
    big = Path(specexec("pull", "mine").out.splitlines()[0])
    with (tmp_path / "config/specexec/config.toml").open("a") as file:
        file.write(f'\n[alias.pinned]\ntarget = "org/big@{PINNED}"\n')
    blobs = big.parent.parent / "blobs"
    for commit in (OLD, PINNED):
        (big.parent / commit).mkdir()
        (blobs / commit[:8]).write_bytes(commit.encode())
        (big.parent / commit / "config.json").symlink_to(blobs / commit[:8])
    stopped, running = blobs / "1234.incomplete", blobs / "5678.incomplete"
    for download, age_s in ((stopped, 2 * QUIET_s), (running, 0)):
        download.write_bytes(bytes(100))
        os.utime(download, (time.time() - age_s,) * 2)
    packs = tmp_path / "packs"
    packs.mkdir()
    packed = packed.rename(packs / "ours")
    half = packed / "layer-00009.safetensors.partial"
    half.write_bytes(bytes(50))
    originals = packs / "ours.originals"
    (originals / ".cache" / "huggingface").mkdir(parents=True)
    (originals / "model.safetensors").write_bytes(bytes(70))
    own = packs / "own"
    own.mkdir()
    (own / "notes.partial").write_text("mine")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    assert specexec("models", "prune").code == 2  # no terminal to confirm at
    told = json.loads(specexec("models", "prune", str(packs), "--dry-run", "--json").out)
    assert {(row["path"], row["why"]) for row in told["found"]} == {
        (str(stopped), "interrupted download"),
        (str(big.parent / OLD), "old revision"),
        (str(half), "interrupted pack"),
        (str(originals), "originals of a pack"),
    }
    assert {path for path in tmp_path.rglob("*") if path.is_file()} >= before

    lock = os.open(packed, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    told = json.loads(specexec("models", "prune", str(packs), "--dry-run", "--json").out)
    assert str(half) not in {row["path"] for row in told["found"]}  # it is being written
    os.close(lock)

    ran = specexec("models", "prune", str(packs), "--yes", "--json")
    assert json.loads(ran.out)["freed_B"] == 100 + 40 + 50 + 70
    gone = before - {path for path in tmp_path.rglob("*") if path.is_file()}
    assert gone == {
        stopped, half, originals / "model.safetensors", blobs / OLD[:8], big.parent / OLD / "config.json",
    }  # fmt: skip
    assert json.loads(specexec("models", "verify", "mine", "--json").out)["damaged"] == []
    assert specexec("models", "prune", str(packs), "--yes").err.endswith("nothing to delete\n")
