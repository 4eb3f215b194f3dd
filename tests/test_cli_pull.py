"""`specexec pull` against a Hub on the loopback: what is fetched, what is not fetched twice, and how refusals read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

import offload
from cli.app import main
from offload.checkpoint.headers import open_folder
from offload.checkpoint.manifest import verify
from offload.hub.local_models import describe
from offload.packs import writer
from offload.packs.pack import pack, plan
from offload.placement.quantized_sizes import FourBits
from tests.command_line import Ran
from tests.fake_hub import COMMIT, FakeHub
from tests.test_offload_pack import stored_tensors
from tests.test_offload_quant import PROMPT
from tests.tiny import logits_of, tiny

Pull = Callable[..., Ran]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    tiny("llama", tmp_path / "big", max_shard_size="100KB")
    tiny("llama", tmp_path / "small", num_hidden_layers=1)
    (tmp_path / "big" / "pytorch_model.bin").write_bytes(b"never")
    with FakeHub({"org/big": tmp_path / "big", "org/small": tmp_path / "small"}).open() as hub:
        yield hub


@pytest.fixture
def aliased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine` is the big model with the small one as its drafter."""
    config = tmp_path / "config" / "specexec"
    config.mkdir(parents=True)
    (config / "config.toml").write_text('[alias.mine]\ntarget = "org/big"\ndrafter = "org/small"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def specexec(
    hub: FakeHub, aliased: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Pull]:
    """The command in this process; what the Hub library reads from its environment once is set in its constants."""
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "hf" / "hub")),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    disable_progress_bars()

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    yield run
    enable_progress_bars()


@pytest.fixture
def started(hub: FakeHub, aliased: None, tmp_path: Path) -> Pull:
    """The command in a process of its own, told by its environment where the Hub is and what is kept where."""

    def run(*arguments: str) -> Ran:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "specexec", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    return run


def test_an_alias_of_ones_own_brings_the_model_and_its_drafter(started: Pull, hub: FakeHub, tmp_path: Path) -> None:
    ran = started("pull", "mine", "--dry-run")
    assert (ran.code, ran.out.count("would download")) == (0, 2), ran.err
    assert not hub.sent
    ran = started("pull", "mine")
    assert ran.code == 0, ran.err
    big, small = (Path(line) for line in ran.out.splitlines())
    assert (big.name, small.name) == (COMMIT, COMMIT)
    assert {file.name for file in big.iterdir()} == {file.name for file in (tmp_path / "big").iterdir()} - {
        "pytorch_model.bin"
    }
    hub.sent.clear()
    again = started("pull", "mine", "--offline")
    assert (again.code, again.out) == (0, ran.out)
    assert again.err == "org/big is here already\norg/small is here already\n"
    assert not hub.sent


def test_every_drafter_that_is_named_is_brought(specexec: Pull, tmp_path: Path) -> None:
    small = str(tmp_path / "small")  # a folder is here already
    runs = [["pull", "mine", "--dry-run", "--json", "--drafter", drafter] for drafter in (
        "sibling+org/small@main+ngram", f"org/small+demo+{small}", "skip+ngram",
    )]  # fmt: skip
    told = told_by(specexec, *runs)
    assert [[one["repo"] for one in run["models"]] for run in told] == [
        ["org/big", "org/small", "org/small"], ["org/big", "org/small"], ["org/big"],
    ]  # fmt: skip
    refused = specexec("pull", "org/alone", "--drafter", "sibling")
    assert refused.code != 0
    assert refused.err.startswith("Error: no drafter is paired with 'org/alone'")


def told_by(specexec: Pull, *runs: list[str]) -> list[Any]:
    """What each of these runs says in JSON."""
    told = []
    for run in runs:
        ran = specexec(*run)
        assert ran.code == 0, ran.err
        told.append(json.loads(ran.out))
    return told


def test_a_pull_says_what_came_of_every_option(specexec: Pull, tmp_path: Path) -> None:
    (tmp_path / "big" / "modeling_own.py").write_text("'never run'")
    base = ["pull", "mine", "--json"]
    mores = [[], ["--drafter", "none"], ["--trust-remote-code"], ["--revision", COMMIT]]
    runs = [*([*base, "--dry-run", *more] for more in mores), base, [*base, "--offline"]]
    dry, alone, trusting, fixed, pulled, offline = told_by(specexec, *runs)
    big, small = dry["models"]
    assert [(one["role"], one["repo"], one["commit"], one["folder"]) for one in (big, small)] == [
        ("target", "org/big", COMMIT, None), ("drafter", "org/small", COMMIT, None),
    ]  # fmt: skip
    assert big["fetch_B"] == sum((tmp_path / "big" / name).stat().st_size for name in big["files"])
    assert [one["repo"] for one in alone["models"]] == ["org/big"]
    assert set(trusting["models"][0]["files"]) - set(big["files"]) == {"modeling_own.py"}
    assert fixed["asked"] == dry["asked"] | {"revision": COMMIT}
    for said, brought, found in zip(dry["models"], pulled["models"], offline["models"], strict=True):
        folder = Path(brought["folder"])
        assert brought == said | {"folder": brought["folder"]}, "a dry run says what comes"
        assert {file.name for file in folder.iterdir()} == set(said["files"])
        assert Path(pulled["cache"]) in folder.parents
        assert found == brought | {"files": [], "fetch_B": 0}
    assert offline["asked"] == pulled["asked"] | {"offline": True}


def test_a_plan_fetches_headers_and_no_weights(specexec: Pull, hub: FakeHub) -> None:
    ran = specexec("plan", "mine", "--json")
    assert ran.code == 0, ran.err
    assert all(row["ram_B"] > 0 for row in json.loads(ran.out)["rows"])
    assert {name for _, name in hub.sent} <= {"config.json", "model.safetensors.index.json"}
    assert {repo for repo, _ in hub.asked} == {"org/big", "org/small"}


def test_only_what_is_missing_is_fetched(specexec: Pull, hub: FakeHub) -> None:
    big = Path(specexec("pull", "org/big", "--drafter", "none").out.strip())
    lost = sorted(big.glob("*.safetensors"))[1]
    lost.resolve().unlink()
    lost.unlink()
    hub.sent.clear()
    refused = specexec("pull", "org/big", "--drafter", "none", "--offline")
    assert (refused.code, refused.out) == (3, "")
    assert f"Missing: {lost.name}." in refused.err
    assert specexec("pull", "org/big", "--drafter", "none").code == 0
    assert [name for _, name in hub.sent] == [lost.name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["org/none"], "Error: no model named 'org/none'."),
        (["org/big", "--revision", "old"], "Error: org/big has no revision 'old'."),
        (["demo"], "Error: 'demo' is no name on the Hub."),
        (["nonsense"], "Error: 'nonsense' is no name on the Hub."),
    ],
)
def test_what_cannot_be_pulled_is_explained(arguments: list[str], words: str, specexec: Pull) -> None:
    ran = specexec("pull", *arguments)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(words)


def test_a_gated_repository_says_how_to_get_in(specexec: Pull, hub: FakeHub) -> None:
    hub.gated.add("org/big")
    ran = specexec("pull", "org/big")
    assert ran.code == 3
    assert ran.err.startswith("Error: org/big is gated and your account has no access yet.\n  Accept the licence at")


def test_size_and_free_space_are_said_first_and_no_bar_goes_into_a_pipe(specexec: Pull) -> None:
    enable_progress_bars()
    ran = specexec("pull", "org/big")
    assert ran.code == 0
    for repo, line in zip(("big", "small"), ran.err.splitlines(), strict=True):
        assert re.fullmatch(rf"downloading \d+ files of org/{repo}, [\d.]+ \S+; [\d.]+ \S+ are free", line), line


def test_a_name_that_is_chatted_with_is_brought_by_the_same_words(specexec: Pull, hub: FakeHub) -> None:
    ran = specexec("chat", "-m", "org/big", "-p", "hello")
    line = ran.err.splitlines()[0]
    assert re.fullmatch(r"Note: downloading \d+ files of org/big, [\d.]+ \S+; [\d.]+ \S+ are free", line), ran.err
    assert any(name.endswith(".safetensors") for _, name in hub.sent)


@pytest.mark.parametrize("command", [("pull", "org/big"), ("chat", "-m", "org/big", "-p", "hello")])
def test_a_full_disk_is_known_before_the_download(
    command: tuple[str, ...], specexec: Pull, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    ran = specexec(*command)
    assert (ran.code, ran.out) == (5, "")
    assert ran.err.startswith("Error: org/big needs ")
    assert "4.9 KiB are free" in ran.err
    assert not [name for _, name in hub.sent if name.endswith(".safetensors")]


def test_a_broken_file_of_aliases_is_named(specexec: Pull, tmp_path: Path) -> None:
    (tmp_path / "config" / "specexec" / "config.toml").write_text("[alias.mine]\nmodel = 'org/big'\n")
    ran = specexec("pull", "mine")
    assert ran.code == 4
    assert "config.toml: [alias.mine] must have a target" in ran.err


@pytest.mark.parametrize(("family", "head"), [("llama", "none"), ("llama", "nf4"), ("llama_tied", "nf4")])
def test_a_pack_is_made_while_the_originals_arrive(
    family: str, head: FourBits, specexec: Pull, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, originals = huggingface_hub.hf_hub_download, []

    def counting(repo: str, name: str, **options: Any) -> str:
        path: str = real(repo, name, **options)
        originals.append(len(list(Path(path).parent.glob("*.safetensors"))))
        return path

    tiny(family, tmp_path / family, max_shard_size="100KB")
    hub.repos["org/big"] = tmp_path / family
    out = tmp_path / "pack"
    arguments = ["pull", "org/big", "--drafter", "none", "--pack", "nf4", "--head-quant", head, "--out", str(out)]
    dry = specexec(*arguments, "--dry-run")
    assert re.fullmatch(r"would download and pack .*\n", dry.out), dry
    monkeypatch.setattr("huggingface_hub.hf_hub_download", counting)
    ran = specexec(*arguments)
    assert (dry.code, ran.code, ran.out) == (0, 0, f"{out}\n"), dry.err + ran.err
    assert max(originals) == 2
    assert verify(out) == []
    assert not (tmp_path / "pack.originals").exists()
    fetched = [name for _, name in hub.sent if name.endswith(".safetensors")]
    assert len(set(fetched)) > 4
    pack(plan(open_folder(tmp_path / family), "nf4", head=head), tmp_path / "local")
    local = stored_tensors(tmp_path / "local")
    assert ("lm_head.weight.absmax" in local) == (head == "nf4")
    assert stored_tensors(out).keys() == local.keys()
    assert all(torch.equal(tensor, local[name]) for name, tensor in stored_tensors(out).items())
    assert describe(out).head == describe(tmp_path / "local").head
    streamed = offload.load(out, "disk")
    assert torch.equal(logits_of(streamed, PROMPT), logits_of(offload.load(tmp_path / "local", "none"), PROMPT))
    offload.stream_of(streamed).close()


def test_a_pack_is_made_from_originals_that_are_here_already(specexec: Pull, hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    arguments = ["pull", "org/big", "--drafter", "none", "--pack", "int8", "--out", str(out)]
    refused = specexec(*arguments, "--offline")
    assert (refused.code, refused.out) == (3, "")
    assert "--offline" in refused.err
    assert not hub.sent
    assert not out.exists()
    assert specexec("pull", "org/big", "--drafter", "none").code == 0
    hub.sent.clear()
    ran = specexec(*arguments, "--offline")
    assert (ran.code, ran.out) == (0, f"{out}\n"), ran.err
    assert not hub.sent
    assert verify(out) == []
    pack(plan(open_folder(tmp_path / "big"), "int8"), tmp_path / "local")
    assert stored_tensors(out).keys() == stored_tensors(tmp_path / "local").keys()


def test_a_pull_into_a_pack_says_what_came_of_every_option(specexec: Pull, tmp_path: Path) -> None:
    base = ["pull", "org/big", "--json", "--drafter", "none"]
    ways = [["--pack", "int8"], ["--pack", "nf4"], ["--pack", "nf4", "--head-quant", "nf4"]]
    runs = [[*base, *way, "--out", str(tmp_path / f"pack{at}")] for at, way in enumerate(ways)]
    told = told_by(specexec, *([*run, "--dry-run"] for run in runs), runs[-1])
    int8, nf4, head, packed = (one["models"][0] for one in told)
    assert int8["pack"]["size_B"] > nf4["pack"]["size_B"] > head["pack"]["size_B"]
    assert [one["pack"]["loads_in_transformers"] for one in (int8, nf4, head)] == [True, True, False]
    originals = sorted(file.name for file in (tmp_path / "big").glob("*.safetensors"))
    assert head["files"] == head["pack"]["originals"] == originals
    assert packed == head | {"folder": str(tmp_path / "pack2")}
    assert (tmp_path / "pack2" / "config.json").is_file()


def test_bits_of_the_head_are_for_packs_only(specexec: Pull) -> None:
    ran = specexec("pull", "org/big", "--head-quant", "nf4")
    assert ran.code == 2
    assert "--head-quant is for packs" in ran.err


def test_a_pack_that_stopped_does_not_fetch_finished_layers_again(
    specexec: Pull, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    arguments = ["pull", "org/big", "--drafter", "none", "--pack", "int8", "--out", str(out)]
    calls = []

    def write(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return writer.write(*arguments)

    with monkeypatch.context() as stopping:
        stopping.setattr("offload.packs.pack.write", write)
        ran = specexec(*arguments)
    assert ran.code == 130
    assert "the same command fetches the rest" in ran.err
    assert not (out / "config.json").exists()
    first = [name for _, name in hub.sent if name.endswith(".safetensors")]
    hub.sent.clear()
    [told] = json.loads(specexec(*arguments, "--json").out)["models"]
    assert verify(out) == []
    second = [name for _, name in hub.sent if name.endswith(".safetensors")]
    assert not set(first[:-2]) & set(second), (first, second)
    originals = {file.name: file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")}
    assert told["pack"]["originals"] == sorted(originals), "those that are not among the files came earlier"
    assert (told["files"], told["fetch_B"]) == (sorted(second), sum(map(originals.__getitem__, second)))
