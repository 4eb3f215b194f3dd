"""Presets: what is kept under a name stands where it was not said otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from cli.app import commands, main
from cli.shared.settings import user_file
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine

POET = ["save", "poet", "-m", "mine", "-b", "7", "-s", "Be brief.", "-t", "0.5", "--stop", "X", "--ram", "2GiB"]


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


@pytest.fixture
def poet(specexec: CommandLine) -> CommandLine:
    assert specexec("preset", *POET).code == 0
    return specexec


@pytest.mark.parametrize("words", [["chat", "-p", "two words"], ["run", "two", "words"]])
def test_a_preset_gives_what_the_line_does_not_say(poet: CommandLine, words: list[str]) -> None:
    assert poet(*words, "--preset", "poet").out == "echo: two words\n"
    assert poet.options is not None
    assert (poet.options.model, poet.options.load.budget, poet.options.load.ram_B) == ("mine", 7, 2 << 30)
    (_, sampling) = poet.engine.asked[-1]
    assert (sampling.temperature, sampling.stop, sampling.max_tokens) == (0.5, ("X",), 512)


def test_what_the_line_and_the_environment_say_goes_first(poet: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECEXEC_CHAT_BUDGET", "9")
    assert poet("chat", "--preset", "poet", "other", "-t", "0", "-p", "hello").code == 0
    assert poet.options is not None
    assert (poet.options.model, poet.options.load.budget) == ("other", 9)
    assert poet.engine.asked[-1][1].temperature == 0


def test_a_model_on_the_line_goes_before_one_of_the_settings(specexec: CommandLine) -> None:
    assert main(["config", "set", "model", "mine", "-q"]) == 0
    assert specexec("chat", "other", "-p", "hello").code == 0
    assert specexec.options is not None
    assert specexec.options.model == "other"
    assert specexec("run", "other", "hello").out == "echo: hello\n"
    assert specexec("chat", "other", "-m", "third", "-p", "hello").code == 2


def test_a_command_says_what_of_a_preset_it_does_not_use(poet: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []

    def names(models: tuple[object, ...], _: object) -> None:
        served.extend(models)
        raise click.Abort  # nothing is served here

    monkeypatch.setattr("cli.serve.command._names", names)
    with pytest.raises(click.Abort):
        commands.main(["serve", "--preset", "poet", "--port", "0"], standalone_mode=False)
    assert [(one.model, one.load.budget) for one in served] == [("mine", 7)]  # type: ignore[attr-defined]  # options
    assert "serve does not use system, temperature, stop" in poet.capture.readouterr().err


def test_presets_are_listed_shown_replaced_and_removed(poet: CommandLine) -> None:
    shown = {"system": "Be brief.", "model": "mine", "budget": 7, "ram": 2 << 30, "temperature": 0.5, "stop": ["X"]}
    assert json.loads(poet("preset", "show", "poet", "--json").out) == shown
    assert poet("preset", "list").out.startswith('poet: system = "Be brief.", model = "mine"')
    assert "replaced poet" in poet("preset", "save", "poet", "-m", "other").err
    assert poet("preset", "show", "poet").out == 'model = "other"\n'
    assert poet("preset", "rm", "poet").code == 0
    assert poet("preset", "list").out == ""
    gone = poet("chat", "--preset", "poet", "-p", "x")
    assert (gone.code, "there is no preset 'poet'" in gone.err) == (3, True)


def test_other_settings_and_comments_stay(specexec: CommandLine) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text('# mine\nmodel = "m"\n[alias.a]\ntarget = "org/a"\n')
    assert specexec("preset", "save", "p", "--think", "low").code == 0
    text = user_file().read_text()
    assert text.startswith('# mine\nmodel = "m"\n[alias.a]\ntarget = "org/a"\n')
    assert '[preset.p]\nthink = "low"\n' in text
    assert specexec("config", "show").out.startswith('model = "m"')


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[preset.p]\nbugdet = 3\n", "preset.p.bugdet"),
        ("[preset.p]\nbudget = 'many'\n", "preset.p.budget: 'many'"),
        ("[preset.p]\nmodel = true\n", "is a value, not true"),
        ("[preset.p]\nmodel = {a = 1}\n", "must be a text"),
        ("preset = 3\n", "preset holds tables alone"),
        ("[preset.p\n", "config.toml"),
    ],
)
def test_a_damaged_preset_is_refused_by_name(specexec: CommandLine, written: str, said: str) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text(written)
    ran = specexec("chat", "--preset", "p", "-p", "x")
    assert (ran.code, said in ran.err, "Traceback" in ran.err) == (2, True, False), ran.err
    assert specexec.options is None


def test_presets_of_a_folder_are_refused(
    specexec: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be another user's."""
    monkeypatch.chdir(tmp_path)
    Path("specexec.toml").write_text("[preset.p]\nmodel = 'm'\n")
    assert specexec("chat", "--preset", "p", "-p", "x").code == 2


def test_nothing_and_what_would_not_come_back_is_not_kept(specexec: CommandLine) -> None:
    for words in ([], ["-s", "@"], ["-b", "many"]):
        assert specexec("preset", "save", "p", *words).code == 2
    assert not user_file().exists()


def test_the_shell_completes_names_of_presets(poet: CommandLine) -> None:
    chat = commands.get_command(click.Context(commands), "chat")
    assert chat is not None
    (option,) = (one for one in chat.params if one.name == "preset")
    context = click.Context(chat)
    assert [item.value for item in option.shell_complete(context, "po")] == ["poet"]
    user_file().write_text("[")
    assert option.shell_complete(context, "") == []
