"""Conversations and settings from the command line: kept, listed, continued; set, shown, overruled."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cli.app import main
from cli.chat.search import excerpt
from cli.shared.settings import user_file
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys, monkeypatch, FakeEngine())


def test_a_chat_is_kept_and_gone_on_with(specexec: CommandLine) -> None:
    first = specexec("chat", stdin="hello\n")
    assert ". Continue with: specexec chat -c\n" in first.err
    (listed,) = json.loads(specexec("sessions", "list", "--json").out)
    assert (listed["title"], listed["messages"], listed["model"]) == ("hello", 2, "demo")
    second = specexec("chat", "-c", stdin="again\n")
    assert f"{listed['id']}: 2 messages; it is read again with the next message\n" in second.err
    shown = json.loads(specexec("sessions", "show", listed["id"][:6], "--json").out)
    assert [message["content"] for message in shown["messages"]] == ["hello", "echo: hello", "again", "echo: again"]


def test_a_conversation_keeps_its_model_unless_another_is_named(specexec: CommandLine) -> None:
    specexec("chat", "-m", "org/first", stdin="hello\n")
    specexec("chat", "-c", "-p", "more")
    assert specexec.options is not None
    assert specexec.options.model == "org/first"
    specexec("chat", "-c", "org/second", "-p", "more", "--json")
    assert specexec.options.model == "org/second"
    (listed,) = json.loads(specexec("sessions", "list", "--json").out)
    assert listed["messages"] == 6


def test_what_need_not_be_kept_is_not(specexec: CommandLine) -> None:
    specexec("chat", "-p", "hello")
    specexec("chat", "--no-save", stdin="hello\n")
    specexec("chat", stdin="/help\n")
    assert specexec("sessions", "list").err == "no conversations yet; specexec chat begins one\n"
    ran = specexec("chat", "-c")
    assert (ran.code, ran.err) == (3, "Error: there is no conversation to continue.\n  Try: specexec chat\n")


def test_words_are_found_again_in_conversations(specexec: CommandLine) -> None:
    """In any case, in any message, also where their JSON has escapes; all of them, and the latest first."""
    for said in ("Tomato soup\n", 'tomato SALAD, she said: "Äpfel\\n"\n', "nothing\n"):
        specexec("chat", "-s", "Be kind.", stdin=said)
    titles = [one["title"] for one in json.loads(specexec("sessions", "search", "TOMATO", "--json").out)]
    assert titles == ['tomato SALAD, she said: "Äpfel\\n"', "Tomato soup"]
    (one,) = json.loads(specexec("sessions", "search", 'äpfel\\n"', "salad", "kind", "--json").out)
    assert (one["message"], one["role"], one["title"]) == (1, "user", titles[0])
    assert one["excerpt"] == one["title"]
    found = specexec("sessions", "search", "tomato", "--limit", "1")
    assert f"{titles[0]}\n    user: {titles[0]}\n" in found.out
    assert found.err == "there are more; another word, or --limit\n"
    assert specexec("sessions", "search", "tomato", "nowhere").err == "no conversation holds tomato and nowhere\n"
    within = specexec("chat", "--no-save", stdin="/search soup tomato\n/search\n/search nowhere\n").err
    assert "    user: Tomato soup\n" in within
    assert "which words? /search WORDS\nno conversation holds nowhere\n" in within


def test_an_excerpt_shows_what_is_around_the_word() -> None:
    assert excerpt("a" * 99 + " needle\n\n" + "b" * 99, ["needle"]) == f"…{'a' * 59} needle {'b' * 53}…"


def test_conversations_are_exported_and_removed(specexec: CommandLine) -> None:
    specexec("chat", "-s", "Be kind.", stdin="hello\n")
    id = json.loads(specexec("sessions", "list", "--json").out)[0]["id"]
    assert "## system\n\nBe kind.\n\n## user\n\nhello\n" in specexec("sessions", "export", id).out
    lines = specexec("sessions", "export", id, "--format", "jsonl").out.splitlines()
    assert [json.loads(line)["role"] for line in lines] == ["system", "user", "assistant"]
    assert specexec("sessions", "rm", id).err == f"removed {id}\n"
    assert specexec("sessions", "rm", id).code == 3


def test_a_setting_is_a_default_that_anything_else_overrules(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> object:
        specexec("chat", "-q", "-p", "x")
        return specexec.engine.asked[-1][1].temperature

    specexec("config", "set", "temperature", "0.1")
    assert asked() == 0.1
    specexec("config", "set", "chat.temperature", "0.2")
    assert asked() == 0.2
    Path("specexec.toml").write_text("[chat]\ntemperature = 0.3\n")
    assert asked() == 0.3
    monkeypatch.setenv("SPECEXEC_CHAT_TEMPERATURE", "0.4")
    assert asked() == 0.4
    specexec("chat", "-q", "-p", "x", "-t", "0.5")
    assert specexec.engine.asked[-1][1].temperature == 0.5


def test_settings_are_shown_with_the_file_that_says_them(specexec: CommandLine) -> None:
    specexec("config", "set", "model", "llama-70b")
    assert specexec("config", "path").out == f"{user_file()}\n"
    assert specexec("config", "show").out == f'model = "llama-70b"  # {user_file()}\n'
    assert json.loads(specexec("config", "show", "--json").out)["model"]["value"] == "llama-70b"
    assert specexec("config", "get", "model").out == "llama-70b\n"
    assert specexec("config", "get", "chat.seed").code == 1


def test_comments_in_a_settings_file_stay(specexec: CommandLine) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text("# mine\nmodel = 'a'  # why\n")
    specexec("config", "set", "chat.max-tokens", "9")
    assert user_file().read_text() == "# mine\nmodel = 'a'  # why\n\n[chat]\nmax_tokens = 9\n"


def test_a_byte_order_mark_that_an_editor_wrote_is_no_part_of_a_file(specexec: CommandLine) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text('\ufeffmodel = "mine"\n[alias.mine]\ntarget = "org/big"\n')
    assert specexec("alias", "list", "--json").out.count("org/big") == 1
    specexec("config", "set", "chat.temperature", "0.5")
    assert specexec("config", "get", "model").out == "mine\n"
    Path("system.txt").write_text("\ufeffBe kind.")
    specexec("chat", "-s", "@system.txt", stdin="hello\n")
    id = json.loads(specexec("sessions", "list", "--json").out)[0]["id"]
    assert "## system\n\nBe kind.\n" in specexec("sessions", "export", id).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("modle", "x"), "modle is no option.\n  Try: model\n"),
        (("chta.seed", "1"), "there is no command 'chta'.\n  Try: [chat]\n"),
        (("chat.temperature", "hot"), "chat.temperature: 'hot' is not a valid number.\n"),
        (("chat.budget", "lots"), "chat.budget: 'lots' is not a valid whole number, nor auto.\n"),
    ],
)
def test_a_setting_that_no_command_would_read_is_refused(
    specexec: CommandLine, arguments: tuple[str, ...], says: str
) -> None:
    ran = specexec("config", "set", *arguments)
    assert (ran.code, ran.err.endswith(says)) == (2, True)
    assert not user_file().exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = ", "is not TOML"),
        ("[chat]\ntemprature = 1\n", "chat.temprature is no option of chat.\n  Try: temperature\n"),
        ("[chat.inner]\nx = 1\n", "chat.inner must be a text, a number"),
        ("budgett = 8\n", "budgett is no option.\n  Try: budget\n"),
        ("[chatt]\nbudget = 8\n", "there is no command 'chatt'.\n  Try: [chat]\n"),
        ("[serve]\nprot = 8\n", "serve.prot is no option of serve.\n  Try: port\n"),
        ("budget = 'lots'\n", "specexec.toml: budget: 'lots' is not a valid whole number, nor auto.\n"),
        ("temperature = [1, 2]\n", "specexec.toml: temperature is one value, not a list.\n"),
        ("[chat]\nstop = 3\n", "specexec.toml: chat.stop is a list of texts.\n"),
        ("seed = true\n", "specexec.toml: seed is a value, not true.\n"),
        ("[chat]\nbell = 'perhaps'\n", "specexec.toml: chat.bell: 'perhaps' is not a valid boolean"),
    ],
)
def test_a_settings_file_that_cannot_be_meant_is_refused(specexec: CommandLine, text: str, says: str) -> None:
    Path("specexec.toml").write_text(text)
    ran = specexec("chat", "-p", "x")
    assert (ran.code, says in ran.err) == (2, True)


def test_settings_of_other_commands_do_no_harm(specexec: CommandLine) -> None:
    Path("specexec.toml").write_text("port = 8001\n[generate]\nlimit = 3\n")
    assert specexec("chat", "-p", "x").code == 0
    Path("specexec.toml").write_text("port = \n")
    assert specexec("version").code == 0


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SPECEXEC_CHAT_BUDGT", "8", "is no option of chat.\n  Try: SPECEXEC_CHAT_BUDGET\n"),
        ("SPECEXEC_CHAT_BUDGET", "lots", ": 'lots' is not a valid whole number, nor auto.\n"),
        ("SPECEXEC_CHAT_BELL", "perhaps", ": 'perhaps' is not a valid boolean"),
    ],
)
def test_a_variable_that_cannot_be_meant_is_named(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    ran = specexec("chat", "-p", "x")
    assert ran.code == 2
    assert ran.err.startswith(f"Error: {variable} in the environment")
    assert says in ran.err
    assert specexec("generate", "-p", "x").code == 0


def test_a_folder_keeps_its_short_name_wherever_one_is(
    specexec: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`packs/mine` looks like a name of the Hub, and would be one in any other folder."""
    (tmp_path / "packs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert specexec("alias", "set", "mine", "packs/mine").code == 0
    assert json.loads(specexec("alias", "list", "--json").out)["mine"]["target"] == str(tmp_path / "packs" / "mine")


def test_short_names_of_ones_own_stand_in_the_settings(specexec: CommandLine) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text("# mine\nmodel = 'big'\n")
    assert specexec("alias", "set", "big", "org/big@v2", "-d", "org/small").code == 0
    assert user_file().read_text().startswith("# mine\nmodel = 'big'\n")
    assert f"big = org/big@v2 with org/small  # {user_file()}\n" in specexec("alias", "list").out
    assert json.loads(specexec("alias", "list", "--json").out)["big"] == {
        "target": "org/big@v2",
        "drafter": "org/small",
    }
    assert specexec("config", "show").out == f'model = "big"  # {user_file()}\n'
    assert specexec("chat", "-p", "x").code == 0
    assert specexec.options is not None
    assert specexec.options.model == "big"
    assert specexec("alias", "rm", "big").err == "removed big\n"
    assert specexec("alias", "rm", "big").code == 3
    assert specexec("alias", "set", "demo", "org/big").code == 2
    for nothing in ("demo", "./nowhere", "big", "a/b/c"):
        ran = specexec("alias", "set", "mine", nothing)
        assert (ran.code, f"{nothing!r} is neither a folder or GGUF file here nor org/repo." in ran.err) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion_script(specexec: CommandLine, shell: str) -> None:
    ran = specexec("completion", shell)
    assert ran.code == 0
    assert "_SPECEXEC_COMPLETE" in ran.out


def test_shells_complete_commands_and_model_names(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def completed(line: str, word: int) -> str:
        monkeypatch.setenv("_SPECEXEC_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(word))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out

    assert "plain,sessions" in completed("specexec se", 1)
    assert "plain,demo" in completed("specexec chat -m d", 3)


@pytest.mark.parametrize("content", [b"model = '\xff'\n", b"model = " + b"[" * 100_000])
def test_a_settings_file_that_cannot_be_read_is_named(specexec: CommandLine, content: bytes) -> None:
    for path in (Path("specexec.toml"), user_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        ran = specexec("chat", "-p", "x")
        assert (ran.code, str(path) in ran.err) == (2, True), ran.err
        path.unlink()


def test_piped_lines_that_are_not_utf_8_are_refused(specexec: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.command_line.io.StringIO", lambda _: io.TextIOWrapper(io.BytesIO(b"hi\n\xff\n"), "utf-8")
    )
    ran = specexec("chat")
    assert (ran.code, "Error: standard input is not UTF-8 text.\n" in ran.err) == (7, True)


def test_clear_begins_another_conversation_and_keeps_the_first(specexec: CommandLine) -> None:
    ran = specexec("chat", "-s", "Be kind.", stdin="one\n/clear\ntwo\n/quit\nnever sent\n")
    listed = json.loads(specexec("sessions", "list", "--json").out)
    assert sorted(one["title"] for one in listed) == ["one", "two"]
    (first,) = (one["id"] for one in listed if one["title"] == "one")
    assert f"{first} is kept; a new conversation\n" in ran.err
    assert json.loads(specexec("sessions", "show", first, "--json").out)["system"] == "Be kind."
