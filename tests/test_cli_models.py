"""`specexec models`: what is here, whether it is whole, and how to be rid of it, without loading anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.pack import pack, plan
from offload.shards import open_folder
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.fake_hub import FakeHub
from tests.test_cli_pull import Pull, specexec  # noqa: F401  # a fixture
from tests.tiny import tiny


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    tiny("llama", tmp_path / "big")
    tiny("llama", tmp_path / "small", num_hidden_layers=1)
    with FakeHub({"org/big": tmp_path / "big", "org/small": tmp_path / "small"}).open() as hub:
        yield hub


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny("mixtral", tmp_path / "original")
    pack(plan(open_folder(tmp_path / "original"), "int8"), tmp_path / "pack")
    return tmp_path / "pack"


def test_a_pack_is_shown_with_its_format_and_who_can_load_it(command: CommandLine, packed: Path) -> None:
    facts = json.loads(command("models", "show", str(packed), "--json").out)
    assert (facts["format"], facts["pack"], facts["loads_in_transformers"], facts["layers"]) == ("int8", True, False, 4)
    assert facts["size_B"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    assert "no, its experts are in a layout of specexec's own" in command("models", "show", str(packed)).out
    original = json.loads(command("models", "show", str(packed.parent / "original"), "--json").out)
    assert (original["format"], original["pack"], original["loads_in_transformers"]) == ("f32", False, True)


def test_a_pack_is_verified_and_removed(command: CommandLine, packed: Path) -> None:
    assert command("models", "verify", str(packed)).out == f"{packed}: every hash is right\n"
    shard = packed / "layer-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ran = command("models", "verify", str(packed), "--json")
    assert (ran.code, json.loads(ran.out)["damaged"]) == (4, [shard.name])
    assert "1 file of" in command("models", "verify", str(packed)).err
    assert command("models", "rm", str(packed)).code == 2  # nobody to ask
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
