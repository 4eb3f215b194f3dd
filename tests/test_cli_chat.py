"""`specexec chat` without a terminal: one answer, or a conversation read line by line."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from cli.chat.command import TOY_QUESTIONS
from tests.command_line import CommandLine, Ran
from tests.fake_engine import FakeEngine

BANNER = """\
demo: a toy built in to show the engine, not for answers. A real model: specexec chat -m llama-70b --offload ram
drafter demo drafter · CPU · budget 64 · context 200 · disk: 5 layers stream, 0.3 MB resident
"""
HINT = "Enter sends · Ctrl-C stops · Ctrl-D leaves · /help\n"


@pytest.fixture
def specexec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


def timeless(text: str) -> str:
    """Without the numbers that no test can know."""
    text = re.sub(r"[\d.]+ s · [\d.]+ tok/s", "S s · R tok/s", text)
    return re.sub(r" MB at \S+ \SB/s", " MB at B", text)


def talk(specexec: CommandLine, *lines: str, options: tuple[str, ...] = ()) -> Ran:
    """A conversation; what is said before the first line is taken away."""
    ran = specexec("chat", "--no-save", *options, stdin="".join(f"{line}\n" for line in lines))
    opening = f"{BANNER}{TOY_QUESTIONS}\n{HINT}"
    assert ran.err.startswith(opening)
    return Ran(ran.code, ran.out, timeless(ran.err.removeprefix(opening)))


def test_one_answer_goes_to_stdout_and_everything_else_to_stderr(specexec: CommandLine) -> None:
    ran = specexec("chat", "-p", "hello")
    assert (ran.code, ran.out) == (0, "echo: hello\n")
    stats = "  11 tokens · S s · R tok/s · 5 sweeps · 2.2 tok/sweep · 6 of 12 guesses kept · seed 42\n"
    assert timeless(ran.err) == BANNER + stats
    assert specexec.engine.closed


def test_quiet_says_nothing_but_the_answer(specexec: CommandLine) -> None:
    for arguments in (("-q", "chat", "-p", "hello"), ("chat", "-p", "hello", "-q")):
        ran = specexec(*arguments)
        assert (ran.out, ran.err) == ("echo: hello\n", "")


def test_piped_text_goes_before_the_prompt(specexec: CommandLine) -> None:
    assert specexec("chat", "-q", "-p", "summarise", stdin="some text\n").out == "echo: some text\n\nsummarise\n"


def test_an_empty_prompt_is_refused_before_anything_is_loaded(specexec: CommandLine) -> None:
    ran = specexec("chat", "-p", "")
    assert (ran.code, ran.out, ran.err) == (7, "", "Error: the prompt is empty.\n")
    assert specexec.options is None


def test_a_prompt_beyond_the_context_is_refused(specexec: CommandLine) -> None:
    ran = specexec("chat", "-q", "-p", "x" * 201)
    assert (ran.code, ran.err) == (7, "Error: the prompt has 201 tokens, the context is 200.\n")


def test_the_stats_line_tells_what_was_streamed_and_how_it_was_slowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specexec = CommandLine(capsys, monkeypatch, FakeEngine(bytes_per_sweep=6_000_000))
    ran = specexec("chat", "-p", "hi", "-t", "0", "--link-limit", "4MB/s")
    assert timeless(ran.err).splitlines()[-1] == (
        "  8 tokens · S s · R tok/s · 4 sweeps · 2.0 tok/sweep · 4 of 8 guesses kept"
        " · 24.0 MB at B · link limited to 4.0 MB/s"
    )


def test_an_answer_cut_by_max_tokens_says_so(specexec: CommandLine) -> None:
    ran = specexec("chat", "-p", "hello", "-n", "5", "-t", "0")
    assert ran.out == "echo:\n"
    assert "  stopped at --max-tokens 5; -n for more\n" in ran.err


def test_engine_options_reach_the_engine(specexec: CommandLine) -> None:
    specexec("chat", "mine", "-d", "none", "--offload", "disk", "-b", "7", "--ctx", "8k",
              "--ram", "10GiB", "--vram", "1GB", "--link-limit", "4MB/s", "--dtype", "f32", "--offline",
             "--exact", "--verify", "--trust-remote-code", "--draft-vocab", "2k", "--draft-window", "4k",
             "--drafter-device", "cpu", "--drafter-quant", "nf4", "--head-quant", "nf4", "--compute", "int8",
             "--kv-quant", "8", "--kv", "auto", "-p", "x")  # fmt: skip
    assert specexec.options is not None
    options = specexec.options.asked
    assert options == {
        "model": "mine", "drafter": "none", "offload": "disk", "budget": 7, "device": "auto",
        "dtype": "f32", "ctx": 8192, "ram": 10 * 2**30, "vram": 10**9, "link_limit": 4e6, "offline": True,
        "exact": True, "verify": True, "trust_remote_code": True,
        "draft_vocab": 2048, "draft_window": 4096, "drafter_device": "cpu", "drafter_quant": "nf4",
        "head_quant": "nf4", "compute": "int8",
        "kv_quant": 8, "kv": "auto", "lossy": (),
        "template_vars": (), "allow_control_tokens": False, "lora": (), "drafter_lora": (),
        "prefix_cache": False,
    }  # fmt: skip


def test_sampling_options_reach_the_sampler(specexec: CommandLine) -> None:
    specexec("chat", "-p", "x", "-t", "0.7", "--top-p", "0.9", "--stop", "a", "--stop", "b", "--seed", "7")
    sampling = specexec.engine.asked[0][1]
    assert (sampling.temperature, sampling.top_p, sampling.stop, sampling.seed) == (0.7, 0.9, ("a", "b"), 7)


def test_an_environment_variable_stands_in_for_an_option(
    specexec: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECEXEC_CHAT_BUDGET", "9")
    specexec("chat", "-p", "x")
    assert specexec.options is not None
    assert specexec.options.load.budget == 9


def test_the_system_prompt_may_come_from_a_file(specexec: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    ran = talk(specexec, "/system", options=("-s", f"@{tmp_path}/system.txt"))
    assert ran.err == "system: Be brief.\n"
    missing = specexec("chat", "-s", "@/nowhere", "-p", "x")
    assert missing.code == 2
    assert "Invalid value for '-s' / '--system': /nowhere cannot be read: No such file or directory." in missing.err


def test_two_models_are_one_too_many(specexec: CommandLine) -> None:
    ran = specexec("chat", "one", "-m", "two", "-p", "x")
    assert ran.code == 2
    assert ran.err.endswith("Error: Two models were named: 'one' and 'two'.\n")


def test_a_conversation_goes_on_until_the_input_ends(specexec: CommandLine) -> None:
    ran = talk(specexec, "one", "", "two", options=("-t", "0"))
    assert (ran.code, ran.out) == (0, "echo: one\necho: two\n")
    assert ran.err == ("  9 tokens · S s · R tok/s · 5 sweeps · 1.8 tok/sweep · 4 of 8 guesses kept\n") * 2


def test_a_mistyped_command_never_reaches_the_model(specexec: CommandLine) -> None:
    ran = talk(specexec, "/bugdet 3", "/zzz")
    assert ran.err == (
        "Unknown command /bugdet: did you mean /budget? Nothing was sent to the model.\n"
        "Unknown command /zzz: /help lists them. Nothing was sent to the model.\n"
    )
    assert specexec.engine.asked == []


def test_two_slashes_send_one(specexec: CommandLine) -> None:
    assert talk(specexec, "/stats off", "//help").out == "echo: /help\n"


def test_an_answer_that_cannot_be_given_leaves_the_conversation_alive(specexec: CommandLine) -> None:
    ran = talk(specexec, "x" * 201, "/stats off", "one")
    assert (ran.code, ran.out) == (0, "echo: one\n")
    assert ran.err == "Error: the prompt has 201 tokens, the context is 200.\nstats off\n"


def test_settings_change_while_talking(specexec: CommandLine) -> None:
    ran = talk(
        specexec, "/set temperature 0.5", "/set top-k 4", "/set stop END", "/set seed 3",
        "/budget 256", "/budget auto", "/stats off", "hi", "/set temperature hot", "/set tempreature 1", "/budget -1",
    )  # fmt: skip
    sampling = specexec.engine.asked[0][1]
    assert (sampling.temperature, sampling.top_k, sampling.stop, sampling.seed) == (0.5, 4, ("END",), 3)
    assert specexec.engine.budget == "auto"
    assert ran.err == (
        "temperature = 0.5\ntop_k = 4\nstop = 'END'\nseed = 3\n"
        "budget 256 (was 64)\nbudget auto (was 256)\nstats off\n"
        "'hot' is not a valid number.\n"
        "/set knows no 'tempreature'; did you mean temperature?\n"
        "-1 is not in the range 0<=x<=4096, nor auto.\n"
    )


def test_undo_retry_and_clear(specexec: CommandLine) -> None:
    ran = talk(specexec, "/undo", "/retry", "/stats off", "one", "/retry 5", "/tokens", "/undo", "/tokens", "/clear")
    assert ran.out == "echo: one\necho: one\n"
    assert [sampling.seed for _, sampling in specexec.engine.asked] == [None, 5]
    assert ran.err == (
        "nothing to undo\nnothing to retry\nstats off\ncontext 12 of 200 tokens, 188 left\n"
        "the last exchange is gone\ncontext 0 of 200 tokens, 200 left\na new conversation\n"
    )


def test_a_file_goes_before_the_next_message_only(specexec: CommandLine, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("NOTES")
    ran = talk(specexec, "/stats off", f"/read {notes}", "sum up", "and now", "/read /nowhere", "/read")
    assert ran.out == "echo: NOTES\n\nsum up\necho: and now\n"
    assert ran.err == (
        f"stats off\n{notes}: 5 characters go before your next message\n"
        "/nowhere: No such file or directory\nwhich file? /read FILE\n"
    )


def test_a_conversation_is_saved_but_never_over_an_older_one(specexec: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    ran = talk(specexec, "/stats off", "hé", f"/save {path}", f"/save {path}", options=("-s", "Be brief."))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "echo: hé"},
    ]
    assert (
        ran.err == f"stats off\n{path}: 3 messages\n{path} is there already and is not replaced; choose another name\n"
    )


def test_the_tree_of_every_sweep_on_request(specexec: CommandLine) -> None:
    ran = talk(specexec, "/stats off", "/tree", "/tree on", "a", "/tree off", "/tree")
    assert ran.out == "e\ncho:\n a\n"
    last = "sweep 3 · 2 guessed · depth 1 · accepted 1 + 1\n ▸ · 100% │ a ← target\n └ ? 100%\n"
    assert ran.err == (
        "stats off\nno sweep yet; /tree on shows every one as it comes\ntree on\n"
        "sweep 1 · 0 guessed · depth 0 · accepted 0 + 1\n │ e ← target\n"
        "sweep 2 · 6 guessed · depth 3 · accepted 3 + 1\n ▸ c 100% ▸ h 100% ▸ o 100% │ : ← target\n"
        " └ ? 100% └ ? 100% └ ? 100%\n"
        f"{last}tree off\n{last}"
    )


def test_the_questions_we_suggest_are_answered_well() -> None:
    demo = files("offload") / "demo"
    golden = {entry["prompt"] for entry in json.loads((demo / "golden.json").read_text())}
    missed = json.loads((demo / "MANIFEST.json").read_text())["golden_missed"]
    suggested = TOY_QUESTIONS.removeprefix("It answers: ").split(" · ")
    assert set(suggested) <= golden - set(missed)


def test_one_answer_can_show_its_trees_too(specexec: CommandLine) -> None:
    ran = specexec("chat", "--tree", "-p", "a")
    assert ran.out == "e\ncho:\n a\n"
    assert ran.err.count(" guessed · depth ") == 3


def test_help_names_every_command(specexec: CommandLine) -> None:
    ran = talk(specexec, "/help")
    assert ran.err.splitlines()[0] == "  /help [COMMAND]                 this list"
    assert ran.err.splitlines()[-1] == "  //text                          send a line that begins with a slash"


def test_show_tells_model_and_settings(specexec: CommandLine) -> None:
    ran = talk(specexec, "/show")
    assert ran.err.startswith(BANNER + "  system              (none)\n  temperature         0.0, the model's own\n")


def test_exit_and_bye_leave_at_once(specexec: CommandLine) -> None:
    for word in ("/exit", "/bye"):
        assert talk(specexec, word, "never sent") == Ran(0, "", "")
    assert specexec.engine.asked == []


def test_the_repl_continues_raw_text_and_keeps_no_memory(specexec: CommandLine) -> None:
    ran = specexec("repl", "-t", "0", stdin="/stats off\none\n/retry\n/tree\n/undo\n/undo\n")
    assert (ran.code, ran.out) == (0, "echo: one\necho: one\n")
    assert [prompt for prompt, _ in specexec.engine.asked] == ["one", "one"]
    assert ran.err == (
        BANNER + HINT + "stats off\nsweep 5 · 0 guessed · depth 0 · accepted 0 + 1\n │ e ← target\n"
        "the last exchange is gone\nnothing to undo\n"
    )
