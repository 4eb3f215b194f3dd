"""Slash commands beyond the first ones: other models and conversations, thoughts, views, and what completes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from cli.chat import slash_settings
from cli.chat.slash import COMMANDS
from cli.shared.options import EngineOptions
from cli.terminal.completer import SlashCompleter
from offload.errors import NotEnoughRam
from tests.command_line import CommandLine, Ran
from tests.fake_engine import FakeEngine
from tests.test_cli_chat import BANNER


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


def talk(specexec: CommandLine, *lines: str, options: tuple[str, ...] = ()) -> Ran:
    """What is said after the introduction."""
    ran = specexec("chat", "--no-stats", *options, stdin="".join(f"{line}\n" for line in lines))
    return Ran(ran.code, ran.out, ran.err.partition("/help\n")[2])


def kept(specexec: CommandLine) -> list[dict[str, object]]:
    return list(json.loads(specexec("sessions", "list", "--json").out))


def test_a_conversation_goes_on_with_another_model_and_another_drafter(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[EngineOptions] = []

    def opened(_: CommandLine, options: EngineOptions, **_rest: object) -> FakeEngine:
        asked.append(options)
        return FakeEngine()

    monkeypatch.setattr(CommandLine, "_open", opened)
    (tmp_path / "other").mkdir()
    ran = talk(specexec, "one", "/model ./other", "two", "/drafter none", "three")
    assert (ran.code, ran.out) == (0, "echo: one\necho: two\necho: three\n")
    assert [(options.model, options.load.drafter) for options in asked] == [
        ("demo", "auto"), ("./other", "auto"), ("./other", "none"),
    ]  # fmt: skip
    (one,) = kept(specexec)
    assert (one["messages"], one["model"]) == (6, str(tmp_path / "other"))
    assert "2 messages; it is read again with the next message\n" in ran.err


def test_a_model_that_is_not_here_is_refused_and_nothing_is_downloaded(specexec: CommandLine) -> None:
    ran = talk(specexec, "/model dmo", "/model", "/model llama-70b", "one")
    assert ran.out == "echo: one\n"
    assert "Error: no model named 'dmo'." in ran.err
    assert "demo; known names: demo, llama-70b" in ran.err
    assert "is not in the local cache" in ran.err


def test_a_drafter_that_cannot_be_is_refused_and_the_engine_stays(specexec: CommandLine) -> None:
    wrong = {
        "sibling+sibling": "names sibling twice",
        "sibling+demo": "names one model twice",
        "sibling+org/small": "is not in the local cache",
        "sibling+./nowhere": "there is no folder ./nowhere",
        "ngrm": "is none of sibling",
    }
    ran = talk(specexec, *(f"/drafter {drafter}" for drafter in wrong), "one")
    assert ran.out == "echo: one\n"
    assert all(said in ran.err for said in wrong.values())
    assert BANNER not in ran.err, "nothing was loaded again"


def test_a_model_that_does_not_load_leaves_the_conversation_with_the_old_one(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choosy(_: CommandLine, options: EngineOptions, **_rest: object) -> FakeEngine:
        if options.load.drafter == "none":
            raise NotEnoughRam("it needs 9 GiB, 1 GiB is free.")
        return FakeEngine()

    monkeypatch.setattr(CommandLine, "_open", choosy)
    ran = talk(specexec, "one", "/drafter none", "two")
    assert (ran.code, ran.out) == (0, "echo: one\necho: two\n")
    assert "Error: it needs 9 GiB, 1 GiB is free.\n" in ran.err
    assert kept(specexec)[0]["messages"] == 4


def test_another_conversation_is_taken_up_and_the_first_one_kept(specexec: CommandLine) -> None:
    talk(specexec, "old")
    (old,) = kept(specexec)
    ran = talk(specexec, "new", "/sessions", "/save", f"/load {old['id']}", "more", "/load", "/load nowhere")
    assert f"{old['id']}  " in ran.err
    assert "every turn is kept as " in ran.err
    assert "which conversation? /sessions lists them\nError: there is no conversation 'nowhere'.\n" in ran.err
    assert [one["messages"] for one in kept(specexec)] == [4, 2]
    assert "would be lost" in talk(specexec, f"/load {old['id']}", options=("--no-save",)).err


def test_a_message_is_written_in_the_editor(specexec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.edit", lambda text, extension: "from the\neditor\n")
    assert talk(specexec, "/edit").out == "echo: from the\neditor\n"
    monkeypatch.setattr("click.edit", lambda text, extension: None)
    assert talk(specexec, "/edit") == Ran(0, "", "empty: nothing was sent to the model\n")


def test_help_about_one_command(specexec: CommandLine) -> None:
    ran = talk(specexec, "/help retry", "/help /undo", "/help undoo")
    assert ran.err == (
        "  /retry [SEED]  answer the last message again\n  /undo  forget the last message and its answer\n"
        "there is no command /undoo: did you mean /undo?\n"
    )


def test_every_view_shows_its_part(specexec: CommandLine) -> None:
    ran = talk(specexec, "/show model", "/show plan", "/show template", "/show samplign")
    assert ran.err == (
        f"{BANNER}disk: 5 layers stream, 0.3 MB resident\nthis model has no chat template\n"
        "/show knows model, sampling, plan, template, prompt; did you mean sampling?\n"
    )


def test_settings_are_shown_as_they_are_obeyed(specexec: CommandLine) -> None:
    shown = talk(specexec, "/set top_p 0.9", "/set stop END", "/set seed 7", "/show sampling").err.splitlines()[3:]
    assert dict(line.split(None, 1) for line in shown) == {
        "temperature": "0.0, the model's own", "top_k": "0, the model's own", "top_p": "0.9",
        "min_p": "0.0, the model's own", "repetition_penalty": "1.0, the model's own", "presence_penalty": "0.0",
        "frequency_penalty": "0.0", "max_tokens": "512", "seed": "7", "stop": "'END'", "ignore_eos": "off",
    }  # fmt: skip
    assert talk(specexec, "/set seed auto", "/set temperature auto").err.splitlines() == [
        "seed = another for every answer", "temperature = 0.0, the model's own",
    ]  # fmt: skip


def test_a_setting_without_a_name_is_asked_for(specexec: CommandLine) -> None:
    assert talk(specexec, "/set").err == "which setting? /set KEY VALUE; /show sampling lists them\n"


def test_long_statistics_say_where_the_time_went(specexec: CommandLine) -> None:
    ran = talk(specexec, "/stats long", "hello", "/stats long")
    assert ran.err.startswith("no answer yet\n  per sweep  ")
    assert " = sweep 0.500 + drafting 0.000 + other 0.000\n" in ran.err
    assert "  tokens     2.2 per sweep, 6 of 12 guesses kept\n" in ran.err
    assert "  by depth   .60 .40 .20\n" in ran.err
    assert "  where      disk: 5 layers stream, 0.3 MB resident\n" in ran.err


def test_thoughts_are_asked_for_hidden_and_looked_at(specexec: CommandLine) -> None:
    ran = talk(
        specexec, "/think", "/think on", "/think hide", "hi", "/think show", "/think maybe", options=("--no-save",)
    )
    assert ran.err == (
        "no thoughts before the last answer\n"
        "think on: has no effect; the model has no chat template that could set how much to think.\n"
        "thoughts are counted only\nthoughts are shown\n"
        "/think auto, off, on, low, medium, high: how much; /think hide or show is about the screen\n"
    )
    assert "think off: has no effect" in specexec("chat", "--think", "off", stdin="/exit\n").err


def test_three_quotes_hold_several_lines(specexec: CommandLine) -> None:
    ran = talk(specexec, '"""one', "", 'two"""', '"""three"""', '""" never closed')
    assert ran.out == 'echo: one\n\ntwo\necho: three\necho: """ never closed\n'


def completed(text: str) -> list[str]:
    completer = SlashCompleter(COMMANDS)
    return [one.text for one in completer.get_completions(Document(text), CompleteEvent(completion_requested=True))]


def test_commands_keys_models_conversations_and_paths_are_completed(specexec: CommandLine, tmp_path: Path) -> None:
    assert completed("/ed") == ["/edit", "/edit-last"]
    assert completed("/set top") == ["top_k ", "top_p "]
    assert "llama-70b" in completed("/model ll")
    assert completed("/tree o") == ["on", "off"]
    (tmp_path / "notes.txt").write_text("")
    assert completed("/read no") == ["tes.txt"]
    talk(specexec, "hello")
    assert completed("/load ") == [kept(specexec)[0]["id"]]
    assert completed("what about /ed") == completed("/nothing x") == completed("/ed\n") == []


def test_the_engine_is_closed_before_the_next_one_is_opened(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[FakeEngine] = []

    def opened(_: CommandLine, options: EngineOptions, **_rest: object) -> FakeEngine:
        assert all(engine.closed for engine in engines)
        engines.append(FakeEngine())
        return engines[-1]

    monkeypatch.setattr(CommandLine, "_open", opened)
    talk(specexec, "/drafter none", "/drafter auto")
    assert len(engines) == 3


def test_what_a_command_says_fits_the_terminal_but_a_template_stays_as_it_is(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "as long a line as a person may type into a terminal that is as narrow as this one"
    monkeypatch.setattr(slash_settings, "template_of", lambda _: long)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    ran = specexec("chat", "--plain", stdin="/help\n/show template\n").err.splitlines()
    at = ran.index("  /set KEY VALUE")
    assert ran[at + 1] == "      change how tokens are chosen,"
    assert max(map(len, ran[: ran.index("  //text") + 3])) < 40
    assert long in ran
