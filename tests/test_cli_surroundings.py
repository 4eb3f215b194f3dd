"""What the run's surroundings ask for: colours, folders, a log for programs, the terminal's own bar."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cli.app import main
from cli.chat.archive import sessions_folder
from cli.engine.learned_store import speeds_path
from cli.shared.options import EngineOptions
from cli.terminal.lines import history_path
from cli.terminal.screen import Screen, watched
from offload.hub import names
from offload.machine.folders import folder_of
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


@pytest.mark.parametrize(
    ("asked", "variables", "coloured"),
    [
        ([], {}, False),
        (["--color", "always"], {}, True),
        ([], {"FORCE_COLOR": "1"}, True),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ([], {"SPECEXEC_CHAT_COLOR": "always"}, True),
        (["--color", "always", "--plain"], {}, False),
    ],
)
def test_colours_where_they_are_asked_for_and_never_in_the_answer(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, asked: list[str], variables: dict[str, str], coloured: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = command("chat", "-p", "hello", "-t", "0", *asked)
    assert ran.out == "echo: hello\n"
    assert ("\x1b[2m" in ran.err) == coloured


def test_one_folder_may_hold_everything_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ours"
    monkeypatch.setenv("SPECEXEC_HOME", str(home))
    places = {names.user_file(), sessions_folder(), speeds_path(EngineOptions()), history_path(), folder_of("cache")}
    assert all(place.is_relative_to(home) for place in places), places
    assert main(["config", "set", "chat.bell", "true", "-q"]) == 0
    assert (home / "config" / "config.toml").read_text() == "[chat]\nbell = true\n"


def test_everything_is_written_below_that_folder(
    real: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a home that cannot be written to, so that a forgotten path would show."""
    for kind in ("DATA", "CONFIG", "STATE", "CACHE"):
        monkeypatch.delenv(f"XDG_{kind}_HOME")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path / "ours"))
    ran = real("chat", "--no-history", "-d", "ngram", stdin="List the days of the week.\n")
    assert ran.code == 0, ran.err
    assert "Note:" not in ran.err
    kinds = {file.relative_to(tmp_path / "ours").parts[0] for file in (tmp_path / "ours").rglob("*") if file.is_file()}
    assert kinds == {"data", "state", "cache"}


def test_a_log_for_programs_is_an_object_a_line(command: CommandLine, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def crash() -> None:
        raise ZeroDivisionError("a bug of ours\nin two lines")

    command.fail_with(crash)
    assert command("chat", "-p", "x", "--log-file", str(log), "--log-json").code == 1
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["level"] for entry in entries][-1] == "error"
    assert {"time", "level", "logger", "message", "traceback"} <= set(entries[-1])
    assert "ZeroDivisionError" in entries[-1]["traceback"]
    assert entries[-1]["time"].endswith("+00:00")


class Counted:
    """A bar of tqdm that is not shown."""

    n: float = 0
    total: float | None = 8

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0


@pytest.mark.parametrize(("terminal", "shown"), [({"WT_SESSION": "1"}, True), ({"TERM_PROGRAM": "iTerm.app"}, False)])
def test_a_terminal_with_its_own_bar_moves_it_and_no_other_gets_one(
    terminal: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("WT_SESSION", "ConEmuANSI", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **terminal}.items():
        monkeypatch.setenv(name, value)
    seen = Terminal()
    monkeypatch.setattr("sys.stderr", seen)
    bar = Counted()
    advance = watched(bar, Screen())
    advance(2)
    advance(6)
    assert bar.n == 8
    assert seen.getvalue() == ("\x1b]9;4;1;25\x07\x1b]9;4;0;0\x07" if shown else "")
