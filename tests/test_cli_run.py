"""Commands as people type them elsewhere: `run MODEL words`, `ls`, `show`; and a `cli.py` of the user's own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cli.app import COMMANDS, main
from cli.shared.options import EngineOptions
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).parent.parent


class Terminal(io.StringIO):
    """Standard input of someone who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    found = FakeEngine()
    monkeypatch.setattr("cli.engine.open.open_engine", lambda options, **_: found)
    return found


@pytest.mark.parametrize(
    ("stdin", "words", "answer"),
    [(io.StringIO(), ["say", "it"], "echo: say it\n"),
     (io.StringIO("piped\ntwice\n"), [], "echo: piped\ntwice\n"),
     (io.StringIO("piped\n"), ["and", "typed"], "echo: piped\n\nand typed\n")],
)  # fmt: skip
def test_run_answers_what_is_typed_and_what_is_piped_as_one_prompt(
    stdin: io.StringIO, words: list[str], answer: str, engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["run", "demo", *words]) == 0
    assert capsys.readouterr().out == answer


def test_run_without_words_is_a_conversation(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talked: list[object] = []

    def converse(options: EngineOptions, *_: object, **__: object) -> int:
        talked.append(options.model)
        return 0

    monkeypatch.setattr("cli.chat.command.converse", converse)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert (main(["run", "demo"]), talked) == (0, ["demo"])
    assert main(["run"]) == 2
    assert "Missing argument 'MODEL'" in capsys.readouterr().err


def test_models_are_listed_and_shown_under_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    for short, long in (["ls"], ["models", "list"]), (["show", "demo"], ["models", "show", "demo"]):
        assert (main(short), main(long)) == (0, 0)
        told = capsys.readouterr().out
        assert told[: len(told) // 2] == told[len(told) // 2 :] != ""


def test_help_comes_in_sections_and_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in told] == []
    assert main(["chat", "--help"]) == 0
    told = capsys.readouterr().out
    places = [
        told.index(f"\n{section}:\n") for section in ("Options", "Tools", "Memory", "Drafting", "Sampling", "Output")
    ]
    assert places == sorted(places)
    assert places[2] < told.index("  --vram ") < places[3] < told.index("  -b, --budget ") < places[4]
    assert places[4] < told.index("  -t, --temperature ") < places[5] < told.index("  --markdown ")


def test_a_module_of_the_users_with_our_names_is_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("cli", "offload"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not specexec')")
    paths = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-m", "specexec", "models", "path", "demo"],
        cwd=tmp_path, env=paths, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, str(ROOT / "offload" / "demo" / "target"), "")
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["specexec"]
    assert script == "specexec.__main__:main"
