"""What every command shares: exit codes, errors as text, and that asking for help costs no torch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import offload.errors
import specexec.errors
from cli.shared.errors import EXIT_CODES, explain
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine

PYTHON = [sys.executable, "-c"]
FAKED = """
import sys
sys.path.insert(0, {root!r})
from cli.engine.imports import lean_imports
with lean_imports():
    from tests.fake_engine import FakeEngine
import cli.engine.open
import cli.terminal.interrupts
cli.engine.open.open_engine = lambda options, **_: FakeEngine(sweep_s=3600, quick={quick}, deaf={deaf})
cli.terminal.interrupts.AGAIN_S = 3600  # a busy machine may take long over everything
from cli.app import main
sys.exit(main({arguments!r}))
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


def faked(*arguments: str, quick: int = 10**6, deaf: bool = False) -> list[str]:
    """A process of its own with the fake engine, whose sweeps after the first `quick` take an hour."""
    root = str(Path(__file__).parents[1])
    return [*PYTHON, FAKED.format(root=root, quick=quick, deaf=deaf, arguments=list(arguments))]


def test_every_code_has_an_exit_code() -> None:
    ours = {kind.code for kind in specexec.errors.SpecexecError.__subclasses__()}
    codes = ours | {kind.code for kind in offload.errors.OffloadError.__subclasses__()}
    assert codes <= set(EXIT_CODES)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("model_not_found", 3), ("corrupt_shard", 4), ("not_enough_ram", 5), ("no_gpu", 6), ("empty_prompt", 7)],
)
def test_a_refusal_is_three_lines_and_its_exit_code(command: CommandLine, code: str, exit_code: int) -> None:
    def refuse() -> None:
        kind = type("Refusal", (offload.errors.OffloadError,), {"code": code})
        raise kind("no model named 'lama-70b'.", "Not an alias, not a folder.", "llama-70b")

    command.fail_with(refuse)
    ran = command("chat", "-p", "x")
    assert (ran.code, ran.out) == (exit_code, "")
    assert ran.err == "Error: no model named 'lama-70b'.\n  Not an alias, not a folder.\n  Try: llama-70b\n"


def test_a_bug_is_reported_as_one_without_a_traceback(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise ZeroDivisionError("division by zero")

    command.fail_with(crash)
    ran = command("chat", "-p", "x")
    assert ran.code == 1
    assert ran.err == (
        "Internal error in crash(): ZeroDivisionError: division by zero\n"
        "  This is a bug, please report it. Run again with -vv for the traceback.\n"
    )
    assert "Traceback" in command("chat", "-p", "x", "-vv").err
    monkeypatch.setenv("SPECEXEC_DEBUG", "1")
    assert "Traceback" in command("chat", "-p", "x").err


def test_with_json_errors_are_json_too(command: CommandLine) -> None:
    ran = command("models", "show", "dmo", "--json")
    assert (ran.code, ran.err) == (3, "")
    error = json.loads(ran.out)["error"]
    assert (error["code"], error["hint"]) == ("model_not_found", "demo")
    assert error["message"].startswith("no model named 'dmo'.\nNot an alias and not a folder")
    ran = command("plan", "--json", "--ctx", "many")
    assert (ran.code, ran.err, json.loads(ran.out)["error"]["code"]) == (2, "", "usage")


@pytest.mark.parametrize("crash", [True, False])
def test_a_log_file_holds_errors_and_the_traceback_of_a_bug(tmp_path: Path, crash: bool) -> None:
    log = tmp_path / "specexec.log"
    broken = "raise ZeroDivisionError('by zero')" if crash else "raise FileNotFoundError(28, 'full', 'x')"
    script = (
        f"import sys, cli.engine.open\ndef broken(options, **_): {broken}\ncli.engine.open.open_engine = broken\n"
        "from cli.app import main; sys.exit(main(sys.argv[1:]))"
    )
    for _ in range(2):
        ran = subprocess.run(
            [*PYTHON, script, "chat", "-p", "x", "--log-file", str(log)], capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    text = log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "Traceback" not in ran.stderr
    assert text.count(" ERROR cli.app: ") == 2
    assert (f"The traceback is in {log}." in ran.stderr, "Traceback" in text) == (crash, crash)


def test_a_log_file_that_cannot_be_written_is_refused(command: CommandLine, tmp_path: Path) -> None:
    ran = command("chat", "-p", "x", "--log-file", str(tmp_path / "no" / "log"))
    assert ran.code == 2
    assert "cannot be written: No such file or directory." in ran.err


def test_a_full_disk_is_not_a_bug() -> None:
    assert explain(OSError(28, "No space left on device", "/tmp/x")) == "Error: no space left on the device (/tmp/x)."


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["config", "set", "model", "demo"], "config"),
        (["alias", "set", "mine", "org/model"], "config"),
        (["sessions", "list"], "data/sessions"),
        (["chat", "-c", "-p", "x"], "data/sessions"),
        (["generate", "-p", "x", "-o", "home/out.jsonl"], "out.jsonl"),
        (["generate", "-p", "x", "--output-dir", "home/out"], "out"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_and_no_bug(
    command: CommandLine, arguments: list[str], refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where our folders should be lies a file: what even the administrator may not write into."""
    monkeypatch.chdir(tmp_path)
    Path("home").write_text("in the way")
    monkeypatch.setenv("SPECEXEC_HOME", "home")
    ran = command(*arguments)
    assert ran.code == 3
    assert ran.err.startswith("Error: ")
    assert f"{refused}: Not a directory.\n" in ran.err or "home: File exists.\n" in ran.err


def test_notes_say_what_they_have_to_say_once(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import logging; from cli.shared.verbosity import Verbosity, start_logging; start_logging(Verbosity());"
        "note = logging.getLogger('specexec.words').warning; note('beware'); note('beware'); note('of %s', 'dogs')"
    )
    ran = subprocess.run([*PYTHON, script], capture_output=True, text=True)
    assert ran.stderr == "Note: beware\nNote: of dogs\n"


def test_wrong_usage_names_what_was_probably_meant(command: CommandLine) -> None:
    ran = command("chta")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith("Error: No such command 'chta'. Did you mean 'chat'?\n")
    ran = command("chat", "--offlod", "disk")
    assert ran.code == 2
    assert "--offload" in ran.err
    assert command("chat", "-t", "1000").code == 2
    assert command("chat", "--device", "tpu").err.endswith("'tpu' is none of auto, cpu, cuda and cuda:N.\n")


def test_help_shows_every_command_and_its_options(command: CommandLine) -> None:
    ran = command("--help")
    assert ran.code == 0
    for name in ("chat", "generate", "repl", "serve", "models", "sessions", "config", "completion", "version"):
        assert f"  {name} " in ran.out
        assert command(name, "-h").code == 0


def test_models_lists_the_demo_and_shows_it(command: CommandLine) -> None:
    assert command("models").out.splitlines()[1].split()[:3] == ["demo", "built", "in"]
    assert command("models", "list").out == command("models").out
    shown = command("models", "show", "demo").out.splitlines()
    assert shown[0].split() == ["name", "demo"]
    assert {line[21] for line in shown} == {" "}, (
        "the longest name is loads_in_transformers: values begin below each other"
    )
    ran = command("models", "show", "dmo")
    assert ran.code == 3
    assert ran.err.startswith("Error: no model named 'dmo'.\n")
    assert ran.err.endswith("  Try: demo\n")


def test_version_knows_itself_and_its_parts(command: CommandLine) -> None:
    assert command("version").out == command("--version").out.replace(", version", "")
    assert "\ntorch 2" in command("version", "-v").out


WORDS = [
    ["--help"], ["chat", "--help"], ["generate", "-h"], ["serve", "--help"], ["config", "show"], ["sessions", "list"],
    ["completion", "bash"], ["config", "--help"], ["models"], ["models", "show", "demo"], ["version", "-v"],
    ["chat", "--no-such-option"], ["chat", "--budget", "many"], ["generate"], ["chat", "-p", ""],
]  # fmt: skip
WITHOUT_TORCH = f"""
import sys
from cli.app import main
for words in {WORDS}:
    main(words)
    if heavy := {{"torch", "transformers", "accelerate", "prompt_toolkit"}} & set(sys.modules):
        sys.exit(f"{{words}} imported {{heavy}}")
"""


def test_words_never_import_torch() -> None:
    ran = subprocess.run([*PYTHON, WITHOUT_TORCH], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Usage: ") >= 5, "each word was obeyed"


def test_a_closed_pipe_ends_quietly() -> None:
    script = 'specexec() { "$@"; }; specexec "$@" | head -c 1; exit ${PIPESTATUS[0]}'
    many = [word for number in range(2000) for word in ("-p", f"prompt {number}")]
    ran = subprocess.run(
        ["bash", "-c", script, "bash", *faked("-q", "generate", *many)], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (141, "e", "")


@pytest.mark.parametrize("before", [False, True])
def test_a_lean_start_hides_libraries_unless_transformers_may_have_found_them(before: bool) -> None:
    loaded = "sys.modules['transformers'] = sys" if before else "pass"
    script = f"import sys; {loaded}; from cli.engine.imports import lean_imports as lean\n"
    script += "with lean(): print(sys.modules.get('scipy', 'seen'))"
    ran = subprocess.run([*PYTHON, script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert ran.stdout == ("seen\n" if before else "None\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_standard_streams_do_no_harm(closed: str) -> None:
    command = shlex.join(faked("chat", "-p", "x"))
    ran = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert "rror" not in ran.stdout + ran.stderr


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Everything the process wrote up to `text`."""
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        letter = process.stdout.read(1)
        assert letter, f"ended after {seen!r}"
        seen += letter
    return seen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_answer_kindly_and_keeps_its_beginning(number: int, code: int) -> None:
    process = subprocess.Popen(
        faked("chat", "-p", "a rather long prompt", quick=2), stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    begun = wait_for(process, "echo:")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (begun + out).endswith("\n")
    assert "stopping…\n" in err
    assert "  stopped after 5 tokens\n" in err


def test_a_second_ctrl_c_abandons_the_sweep() -> None:
    process = subprocess.Popen(
        faked("chat", "-p", "a text of many sweeps, whatever may come", quick=2, deaf=True), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(process, "echo:")
    process.send_signal(signal.SIGINT)
    wait_for(process, "stopping…")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "whatever may come" not in rest, "the engine is deaf: nothing else would have ended the answer"


def test_generate_keeps_what_is_done_when_it_is_stopped(command: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command.engine = FakeEngine(sweep_s=3600, quick=6)  # enough for the first answer

    def interrupt() -> None:
        assert command.engine.slow.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    sender.start()
    prompts = ("-p", "one", "-p", "a much longer one", "-p", "two")
    ran = command("generate", *prompts, "-o", str(output), "--parallel=1")
    sender.join()
    assert (ran.code, ran.out) == (130, "")
    assert "stopping…\n1 answered · 1 in part · 1 not begun · " in ran.err
    assert "Continue with the same command and --resume." in ran.err
    (line,) = output.read_text().splitlines()
    assert '"text": "echo: one"' in line
    saved = json.loads((tmp_path / "out.jsonl.partial.json").read_text())
    assert list(saved["items"]) == ["prompt:2"]
