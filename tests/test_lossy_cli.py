"""What changes texts is typed each time, and named wherever the text is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.app import main
from cli.chat.archive import Archive, sessions_folder
from cli.shared.settings import user_file
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.serving import LetterEngine, serving


class LossyEngine(FakeEngine):
    """Says that it is lossy."""

    lossy = ("steps=7",)


class LossyLetters(LetterEngine):
    """The same behind a server."""

    lossy = ("steps=7",)


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, LossyEngine())


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "run", "repl", "bench", "eval"])
def test_no_file_and_no_variable_says_it(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    for text in (f'[{command}]\nlossy = ["steps=7"]\n', 'lossy = ["steps=7"]\n'):
        user_file().write_text(text)
        assert main([command, "--version"]) != 0
        assert "--lossy changes what is written, so it is typed each time." in capsys.readouterr().err
    user_file().unlink()
    monkeypatch.setenv(f"SPECEXEC_{command.upper()}_LOSSY", "steps=7")
    assert main([command, "--version"]) != 0
    assert "--lossy changes what is written, so it is typed each time." in capsys.readouterr().err


def test_no_preset_holds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "save", "quick", "--lossy", "steps=7"]) != 0
    assert "it is typed each time, and no preset holds it" in capsys.readouterr().err
    assert main(["config", "set", "chat.lossy", "steps=7"]) != 0
    assert "typed each time" in capsys.readouterr().err
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text('[preset.quick]\nlossy = ["steps=7"]\n')
    assert main(["chat", "--preset", "quick", "-p", "hello"]) != 0
    assert "typed each time" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["check", "--lossy", "steps=7"], ["distill", "record", "--lossy", "steps=7", "--prompts", __file__, "-o", "x"]],
)
def test_what_needs_exact_texts_refuses_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "--lossy steps=7 cannot be here" in capsys.readouterr().err


def test_it_is_refused_beside_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-p", "hello", "--lossy", "steps=7", "--exact"]) != 0
    assert "exact texts are wanted, and lossy ones" in capsys.readouterr().err


def test_the_line_of_an_answer_and_the_conversation_name_it(
    specexec: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = specexec("chat", "--lossy", "steps=7", stdin="hello\n").err
    assert "LOSSY steps=7\n" in said, "before anything is asked"
    assert "LOSSY steps=7: 0 steps replaced, 0 sweeps saved" in said
    record = Archive(sessions_folder()).latest()
    assert record.lossy == ("steps=7",)
    exact = CommandLine(capsys, monkeypatch, FakeEngine())
    said = exact("chat", "-c", stdin="again\n").err
    assert "Note: some of its answers were written with --lossy steps=7." in said
    assert "LOSSY" not in said, "this answer is exact"
    assert Archive(sessions_folder()).latest().lossy == ("steps=7",)
    assert "some answers with --lossy steps=7" in exact("sessions", "show", record.id).out
    assert json.loads(exact("sessions", "list", "--json").out)[0]["lossy"] == ["steps=7"]


def test_it_is_named_where_no_figures_are_wanted(specexec: CommandLine) -> None:
    said = specexec("chat", "--lossy", "steps=7", "-p", "hello", "--no-stats").err
    assert "  LOSSY steps=7: 0 steps replaced, 0 sweeps saved\n" in said


def test_json_says_it(specexec: CommandLine) -> None:
    said = json.loads(specexec("chat", "--lossy", "steps=7", "-p", "hello", "--json").out)
    assert said["engine"]["lossy"] == ["steps=7"]
    assert said["engine"]["asked"]["lossy"] == ["steps=7"]
    assert (said["steps_replaced"], said["sweeps_saved"]) == (0, 0)


def test_every_record_of_a_batch_names_it(specexec: CommandLine) -> None:
    ran = specexec("generate", "-p", "hello", "--lossy", "steps=7", "--raw", "--json")
    record = json.loads(ran.out)
    nothing = {"steps_replaced": 0, "sweeps_saved": 0, "unread": 0, "kv_dropped": 0}
    assert record["lossy"] == {"asked": ["steps=7"], **nothing}


def test_a_server_says_it_with_every_answer() -> None:
    body = {"prompt": "hi", "max_tokens": 4}
    for engine, named in ((LossyLetters, True), (LetterEngine, False)):
        with serving(engine) as server, server.http as client:
            answer = client.post("/v1/completions", json=body).json()
            assert answer["system_fingerprint"].endswith("-lossy-steps=7") is named
            events = client.post("/v1/completions", json=body | {"stream": True}).text
            assert ("-lossy-steps=7" in events) is named
            assert client.get("/v1/models").json()["data"][0]["meta"]["lossy"] == (["steps=7"] if named else [])
            asking = client.post("/v1/completions", json=body | {"lossy": ["steps=7"]}).json()
            assert asking["system_fingerprint"] == answer["system_fingerprint"], "a request cannot ask for it"
