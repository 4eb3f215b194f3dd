"""The effect of every option is visible in --json: each is changed alone, and the record must say so."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from cli.app import main
from cli.chat import chat
from cli.doctor import doctor
from cli.pack import pack
from cli.plan import plan
from offload.names import demo_folder

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
Command = Callable[..., "Json"]

Changes = dict[str, tuple[list[str], str]]

# Runs of the command; in each, options → how they are typed, and where in the record their effect stands.
CHAT: tuple[Changes, ...] = (
    {
        "temperature": (["--temperature", "0.9"], "sampling.temperature"),
        "top_p": (["--top-p", "0.5"], "sampling.top_p"),
        "top_k": (["--top-k", "3"], "sampling.top_k"),
        "min_p": (["--min-p", "0.3"], "sampling.min_p"),
        "repetition_penalty": (["--repetition-penalty", "1.4"], "sampling.repetition_penalty"),
        "presence_penalty": (["--presence-penalty", "1"], "sampling.presence_penalty"),
        "frequency_penalty": (["--frequency-penalty", "1"], "sampling.frequency_penalty"),
        "seed": (["--seed", "2"], "sampling.seed"),
        "ignore_eos": (["--ignore-eos"], "sampling.ignore_eos"),
        "max_tokens": (["--max-tokens", "2"], "completion_tokens"),
        "prompt": (["--prompt", "What is a drafter?"], "prompt"),
        "system": (["--system", "Answer in one word."], "system"),
        "think": (["--think", "on"], "think"),
        "positional_model": (["{tiny}"], "engine.folders.target"),
    },
    {
        "drafter": (["--drafter", "none"], "engine.sources"),
        "planner": (["--planner", "beam"], "engine.planner"),
        "device": (["--device", "cpu"], "engine.asked.device"),
        "dtype": (["--dtype", "f32"], "engine.dtype"),
        "ctx": (["--ctx", "512"], "engine.context"),
        "offload": (["--offload", "disk"], "engine.placement.offload"),
        "vram": (["--vram", "8GiB"], "engine.asked.vram"),
        "link_limit": (["--link-limit", "400MB/s"], "engine.link_limit_Bps"),
        "exact": (["--exact"], "engine.exact"),
        "offline": (["--offline"], "engine.asked.offline"),
        "verify": (["--verify"], "engine.verified"),
        "trust_remote_code": (["--trust-remote-code"], "engine.asked.trust_remote_code"),
    },
    {"budget": (["--budget", "3"], "drafted"), "stop": (["--stop", "drafter"], "finish_reason")},
    {"model": (["--model", "{tiny}"], "engine.folders.target")},
    {"drafter_quant": (["--drafter-quant", "nf4"], "engine.placement.ram_parts_B.drafter")},
    {"head_quant": (["--head-quant", "nf4"], "engine.asked.head_quant")},
    {"draft_vocab": (["--draft-vocab", "1k"], "engine.placement.ram_parts_B.drafter")},
    {"ram": (["--ram", "40MB"], "engine.placement.ram_B")},
)
# What only says how something is shown or kept, and where conversations come from.
SHOWN = {
    "resume", "session", "no_save", "no_history", "bell", "notify_command", "as_json", "quiet", "verbose", "log_file",
    "log_json", "color",
    "markdown", "plain", "hide_thinking", "stats", "tree",
}  # fmt: skip
PLAN: Changes = {
    "gpu": (["--gpu", "4090"], "machine.device"),
    "link": (["--link", "3GB/s"], "speeds.link_Bps"),
    "disk": (["--disk", "5GB/s"], "speeds.disk_Bps"),
    "ram": (["--ram", "3GiB"], "machine.ram_B"),
    "vram": (["--vram", "3GiB"], "machine.vram_B"),
    "ctx": (["--ctx", "512"], "rows.0.ram_B"),
    "budget": (["--budget", "8"], "rows.0.ram_B"),
    "drafter_quant": (["--drafter-quant", "nf4"], "asked.drafter_quant"),
    "head_quant": (["--head-quant", "nf4"], "rows.0.ram_B"),
    "every": (["--all"], "rows.3.quant"),
    "offline": (["--offline"], "asked.offline"),
}
PACK: Changes = {
    "quant": (["--quant", "none"], "size_B"),
    "out": (["--out", "{tiny}-other"], "out"),
    "device": (["--device", "cuda"], "device"),
    "offline": (["--offline"], "offline"),
    "trust_remote_code": (["--trust-remote-code"], "trust_remote_code"),
    "dry_run": ([], "dry_run"),
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effects") / "tiny"
    shutil.copytree(demo_folder("target"), folder)
    return folder


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str) -> Json:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        capsys.readouterr()
        assert main([*arguments]) == 0, capsys.readouterr().err
        found: Json = json.loads(capsys.readouterr().out)
        return found

    return run


def at(record: Json, path: str) -> Json:
    for key in path.split("."):
        if isinstance(record, list):
            record = record[int(key)]
        else:
            assert isinstance(record, dict)
            record = record[key]
    return record


def options_of(command: click.Command) -> set[str]:
    return {str(parameter.name) for parameter in command.params} - {"help"}


def check(printed: Command, base: list[str], changes: Changes, folder: Path) -> None:
    before = printed(*base)
    typed = [part.replace("{tiny}", str(folder)) for arguments, _ in changes.values() for part in arguments]
    after = printed(*base, *typed)
    assert {name for name, (_, path) in changes.items() if at(before, path) == at(after, path)} == set()


def test_every_option_is_in_the_table() -> None:
    assert options_of(chat) == {name for run in CHAT for name in run} | SHOWN & options_of(chat)
    assert options_of(plan) - SHOWN - {"model"} == PLAN.keys()
    assert options_of(pack) - SHOWN - {"model"} == PACK.keys()
    assert options_of(doctor) - SHOWN == {"quick", "path"}  # test_doctor_gives_rows_and_keeps_what_it_measured


@pytest.mark.parametrize("changes", CHAT, ids=lambda changes: next(iter(changes)))
def test_an_answer_says_what_came_of_every_option(changes: Changes, printed: Command, tiny_folder: Path) -> None:
    base = ["chat", "--json", "-p", "How does specexec work?", "-n", "6", "--seed", "1"]
    check(printed, base, changes, tiny_folder)


def test_a_plan_says_what_came_of_every_option(printed: Command, tiny_folder: Path) -> None:
    for name, change in PLAN.items():
        base = ["plan", str(tiny_folder), "--json", *(["--gpu", "8GiB"] if name in ("link", "vram") else [])]
        check(printed, base, {name: change}, tiny_folder)


def test_a_pack_says_what_came_of_every_option(printed: Command, tiny_folder: Path) -> None:
    base = ["pack", str(tiny_folder), "--json", "--dry-run", "--out", str(tiny_folder.with_name("packed"))]
    dry = {name: change for name, change in PACK.items() if name != "dry_run"}
    check(printed, base, dry, tiny_folder)
    written = printed(*(part for part in base if part != "--dry-run"))
    assert (at(printed(*base), "dry_run"), at(written, "dry_run")) == (True, False)
    assert isinstance(written, dict)
    assert "seconds" in written
