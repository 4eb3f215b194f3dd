"""Words of others show their control codes on a terminal, whichever command prints them; a pipe gets them whole."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from cli.chat.archive import Archive, sessions_folder
from cli.shared.control_codes import visible
from cli.terminal.screen import Screen
from specexec.text.messages import Message
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).parent.parent
NASTY = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\u202ee\x7ff\rg"
SHOWN = "a␛]0;owned␇b␛[2Jc<U+009B>31md<U+202E>e␡f␍g"


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_control_codes_are_shown_and_everything_else_stays() -> None:
    assert visible(NASTY) == SHOWN
    kept = "é 日本 👩‍👩‍👧 ‏עברית\n\t|"
    assert visible(kept) == kept


def test_a_conversation_is_listed_and_shown_without_its_codes_and_exported_with_them(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(sessions_folder())
    talk: tuple[Message, ...] = ({"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY})
    archive.save(archive.new(NASTY).__class__("0612-a", NASTY, messages=talk))
    assert NASTY in specexec("sessions", "export", "0612").out
    on_a_terminal(monkeypatch)
    for command in (("list",), ("show", "0612"), ("export", "0612"), ("list", "--json"), ("show", "0612", "--json")):
        out = specexec("sessions", *command).out
        assert not {*out} & {*"\x1b\x07\x9b\u202e\x7f\r"}, command
    assert SHOWN in specexec("sessions", "show", "0612").out


def test_errors_and_names_of_files_show_their_codes(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_terminal(monkeypatch)
    (tmp_path / NASTY).mkdir()
    for command in (("plan", "-m", f"./{NASTY}"), ("models", "show", NASTY), ("chat", "-p", "x", "-s", f"@{NASTY}")):
        ran = specexec(*command)
        assert ran.code != 0
        assert not {*ran.out, *ran.err} & {*"\x1b\x07\x9b\u202e\x7f\r"}, command


def test_remarks_and_live_lines_show_them_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    screen.say(f"say {NASTY}")
    screen.tell(f"tell {NASTY}")
    with screen.status(lambda: f"live {NASTY}"):
        pass
    seen = "".join(capsys.readouterr())
    assert [word for word in ("say", "tell", "live") if f"{word} {SHOWN}" not in seen] == []


def test_every_command_prints_through_this_door() -> None:
    """Nothing but the door itself, the screen and the plain prompt writes to a stream."""
    doors = {ROOT / "cli" / name for name in ("shared/control_codes.py", "terminal/screen.py", "terminal/lines.py")}
    assert all(door.is_file() for door in doors)
    for file in {*(ROOT / "cli").rglob("*.py")} - doors:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "click.echo", "click.secho"), f"{file}:{node.lineno}"


def test_a_name_that_is_no_text_is_printed_all_the_same(specexec: CommandLine) -> None:
    archive = Archive(sessions_folder())
    archive.save(archive.new("x").__class__("0612-a", "half \udcff", messages=({"role": "user", "content": "hi"},)))
    assert json.loads(specexec("sessions", "show", "0612", "--json").out)["model"] == "half \udcff"
