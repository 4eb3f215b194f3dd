"""`--connect`: chat and generate through a running server give what the same engine gives here."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from cli.app import main
from cli.chat.archive import Archive, Record, sessions_folder
from cli.connect.engine import ServedEngine
from cli.connect.models import cards_of, loaded_model
from cli.connect.server import Server
from cli.serve.command import _listen_on
from cli.shared.errors import NoServer, ServerRefusal
from cli.shared.options import EngineOptions
from cli.terminal.screen import Screen
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst
from tests.agent import TASK, THOUGHT
from tests.command_line import Ran
from tests.serving import LetterEngine, Served, serving
from tests.waiting import until

Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line; nothing may be loaded here."""
    monkeypatch.setattr("cli.engine.open.open_engine", lambda *_, **__: pytest.fail("loaded"))

    def ran(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([*arguments])
        return Ran(code, *capsys.readouterr())

    return ran


def served(server: Served, think: str = "auto") -> ServedEngine:
    model = loaded_model(Server(server.url), "", False, Screen(quiet=True))
    return ServedEngine(model, EngineOptions())


def facts(burst: Burst) -> tuple[object, ...]:
    calls = [(call.name, call.arguments) for call in burst.piece.calls]
    words = (burst.piece.content, burst.piece.reasoning, calls)
    tree = (burst.tree.tokens, burst.tree.parents, burst.path)
    return burst.tokens, words, tree, burst.finish_reason, burst.limit, burst.seed


@pytest.mark.parametrize("most", [200, 5])
def test_a_dialogue_is_the_one_that_the_engine_itself_would_hold(agent: Served, most: int) -> None:
    """Sweep by sweep: tokens, trees, thoughts, calls, and how it ended."""
    sampling = SamplingParams(temperature=0, seed=3, max_tokens=most)
    here, there = agent.worker.engine.conversation("Help."), served(agent).conversation("Help.")
    assert list(map(facts, here.send(TASK, sampling))) == list(map(facts, there.send(TASK, sampling)))
    for talk in (here, there):
        for call in talk.messages[-1].get("tool_calls", []):  # type: ignore[attr-defined]  # a list
            call["id"] = ""
    assert here.messages == there.messages
    assert (here.rendered, here.tokens_used) == (there.rendered, there.tokens_used)


@pytest.mark.parametrize("spelled", ["{}", "unix:{}", "unix://{}"])
def test_a_unix_socket_is_an_address(run: Run, tmp_path: Path, spelled: str) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    with serving(LetterEngine, listening=_listen_on(path)):
        ran = run("run", "letters", "ab", "--connect", spelled.format(path))
        assert (ran.code, ran.out) == (0, "ab\n")
        assert ran.err.startswith(f"letters at unix:{path} · ")
        assert json.loads(run("ps", "--connect", spelled.format(path), "--json").out)[0]["id"] == "letters"
        gone = run("ps", "--connect", f"unix:{other}")
    assert (gone.code, gone.err.splitlines()[0]) == (
        6,
        f"Error: no server answers at unix:{other}: No such file or directory.",
    )


def test_thoughts_and_calls_are_shown_as_they_are_here(agent: Served, run: Run) -> None:
    ran = run("chat", "--connect", agent.url, "-p", TASK, "-t", "0")
    assert (ran.code, ran.out) == (0, 'Let me look.\n→ read_file({"path": "a.txt"})\n')
    assert THOUGHT in ran.err
    assert ran.err.startswith(f"agent at {agent.url} · drafter none")
    told = json.loads(run("run", "agent", TASK, "--connect", agent.url, "-t", "0", "--think", "off", "--json").out)
    assert told["engine"]["revision"]
    assert told["sampling"]["temperature"] == 0


def test_a_conversation_is_kept_here_and_goes_on(letters: Served, run: Run) -> None:
    where = ("--connect", letters.url)
    first = run("chat", *where, "-s", "Be brief.", stdin="abcd\n/undo\nxyz\n")
    assert first.out == "abcd\nxyz\n"
    assert f"Continue with: specexec chat -c {' '.join(where)}" in first.err
    assert run("chat", "-c", *where, "-p", "efg").out == "efg\n"
    (record,) = Archive(sessions_folder()).everything()
    assert isinstance(record, Record)
    assert (record.model, record.system) == ("letters", "Be brief.")
    assert [message["content"] for message in record.messages] == ["xyz", "xyz", "efg", "efg"]


def test_an_answer_that_was_cut_goes_on_and_commands_know_whose_the_model_is(letters: Served, run: Run) -> None:
    lines = "abcdef\n/continue\n/budget 3\n/drafter none\n/model zz\n/model\n/show plan\n/tokens\n"
    ran = run("chat", "--no-save", "--connect", letters.url, "-n", "3", "--ctx", "99", stdin=lines)
    assert ran.out.startswith("abc\n")
    for said in (
        "without effect, for a server loads its models itself: --ctx\n",
        "stopped at --max-tokens 3",
        "the budget is the server's",
        "the drafter is the server's",
        "the server has no model 'zz'; it has letters",
        "letters; known names: letters",
        "nowhere",
        "of 1 000 tokens",
    ):
        assert said in ran.err, said


def test_what_a_server_refuses_leaves_the_conversation_alive(letters: Served, run: Run) -> None:
    ran = run("chat", "--no-save", "--connect", letters.url, stdin=f"{'x' * 2000}\nabc\n")
    assert (ran.code, ran.out) == (0, "abc\n")
    assert "maximum context length is 1000" in ran.err
    assert run("chat", "--connect", letters.url, "-p", "x" * 2000).code == 7


@pytest.mark.parametrize("command", [("chat", "-p", "abc"), ("generate", "-p", "abc")])
def test_a_server_that_cannot_answer_is_said_in_words(run: Run, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
    ran = run(*command, "--connect", nowhere)
    assert (ran.code, "no server answers at http://127.0.0.1" in ran.err) == (6, True)
    with serving(LetterEngine, key="secret") as server:
        closed = run(*command, "--connect", server.url)
        assert (closed.code, "--api-key KEY" in closed.err) == (6, True)
        assert run(*command, "--connect", server.url, "--api-key", "secret").out == "abc\n"
        unknown = run(*command, "--connect", server.url, "--api-key", "secret", "-m", "zz")
        assert (unknown.code, "no model 'zz'; it has letters" in unknown.err) == (3, True)


def test_a_server_that_loads_is_waited_for_and_a_model_is_loaded_by_its_name(run: Run) -> None:
    ready = threading.Event()

    def slow() -> LetterEngine:
        ready.wait(60)
        return LetterEngine()

    with serving(slow, wait=False, others={"two": LetterEngine}) as server:
        threading.Timer(0.2, ready.set).start()
        assert run("chat", "--connect", server.url, "-p", "abc").out == "abc\n"
        assert run("chat", "--connect", server.url, "-m", "two", "-p", "abc").out == "abc\n"
        assert [card["status"] for card in cards_of(Server(server.url))] == [{"value": "unloaded"}, {"value": "loaded"}]


def test_stopping_an_answer_keeps_what_there_is_and_frees_the_server() -> None:
    with serving(lambda: LetterEngine(sweep_s=0.05)) as server:
        engine = served(server)
        talk = engine.conversation()
        bursts = talk.send("x" * 900, SamplingParams())
        said = [next(bursts), next(bursts)]
        engine.stop()
        said += bursts
        assert said[-1].finish_reason == "interrupted"
        assert set(str(talk.messages[-1]["content"])) == {"x"}
        assert talk.can_proceed
        until(lambda: server.worker.running == 0)
        assert [burst.text for burst in talk.send("abc", SamplingParams())] == ["abc"]


@pytest.mark.parametrize("resets", [False, True])
def test_a_server_that_goes_in_the_middle_is_an_error_and_not_an_end(resets: bool) -> None:
    heard = threading.Event()

    def breaking(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"one": 1}\n\n')
            heard.wait(60)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=breaking, args=(listening,), daemon=True).start()
        events = iter(Server(f"127.0.0.1:{listening.getsockname()[1]}").events("/v1/chat/completions", {}))
        assert next(events) == {"one": 1}
        heard.set()
        with pytest.raises(NoServer, match="broke off in the middle"):
            next(events)


@pytest.mark.parametrize("address", ["ftp://here", "http://", "http://here:port", "http://[::1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(click.UsageError, match="--connect"):
        Server(address)


LINES = [
    {"id": "plain", "prompt": TASK, "temperature": 0},
    {"id": "two", "messages": [{"role": "user", "content": TASK}], "n": 2, "max_tokens": 4},
    {"id": "shaped", "prompt": TASK, "response_format": {"type": "json_schema", "schema": {"enum": ["ab", "cd"]}}},
    {"id": "long", "prompt": TASK, "max_tokens": 100000},
    {"id": "odd", "prompt": TASK, "logprobs": True},
]


@pytest.mark.parametrize("command", [("chat", "-p", "abc"), ("generate", "-p", "abc")])
def test_the_first_model_of_a_server_answers_though_another_one_has_the_name_of_ours(
    run: Run, command: tuple[str, ...]
) -> None:
    with serving(LetterEngine, names=("first",), others={EngineOptions().model: LetterEngine}) as server:
        ran = run(*command, "--connect", server.url)
        assert (ran.code, ran.err.split(" at ")[0]) == (0, "first")
        assert run(*command, "--connect", server.url, "-m", "demo").err.startswith("demo at ")


def test_a_run_gives_the_records_that_it_would_give_here(
    agent: Served, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    where, common = tmp_path / "there.jsonl", ["--seed", "5", "--temperature", "0.8", "-n", "40"]
    model = str(agent.worker.engine.folders["target"])
    ran = run("generate", str(tmp_path / "in.jsonl"), "-o", str(where), "--connect", agent.url, *common)
    assert (ran.code, "odd: logprobs: log-probabilities are not read" in ran.err) == (8, True)
    monkeypatch.undo()
    local = ["-m", model, "--drafter", "none", "--dtype", "f32", *common]
    assert main(["generate", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "here.jsonl"), *local]) == 0

    def records(path: Path) -> dict[str, dict[str, object]]:
        found = {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}
        for record in found.values():
            for call in record["tool_calls"] or []:
                call["id"] = ""
            for key in ("seconds", "bytes_read", "model", "sweeps", "tokens_per_sweep"):
                del record[key]
        return found

    there, here = records(where), records(tmp_path / "here.jsonl")
    assert there.pop("odd")["error"]
    del here["odd"]
    assert there == here
    assert there["two"]["limit"] == "max_tokens"


def test_how_far_a_run_is_goes_into_a_pipe_as_words_and_as_no_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.batch.run.REPORT_EVERY_S", 0.01)
    with serving(lambda: LetterEngine(sweep_s=0.1)) as server:
        ran = run("generate", "-p", "x" * 12, "--connect", server.url)
    said = [line for line in ran.err.splitlines() if "/1 items · " in line]
    assert said
    assert all(re.match(r" *\d+%, \d/1 items · ", line) for line in said), said


def test_a_run_that_loses_its_server_keeps_what_was_answered_and_goes_on(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("abc\ndef\n" + "x" * 400 + "\n")
    asked = ("generate", str(prompts), "--split", "lines", "-o", str(tmp_path / "out.jsonl"), "--seed", "1")
    with serving(lambda: LetterEngine(sweep_s=0.2)) as server:
        threading.Thread(target=lambda: _stop_after_two(server, tmp_path / "out.jsonl"), daemon=True).start()
        lost = run(*asked, "--connect", server.url)
        assert (lost.code, "stops." in lost.err) == (6, True)
    with serving(LetterEngine) as server:
        again = run(*asked, "--connect", server.url, "--resume")
        assert (again.code, "2 finished" in again.err) == (0, True)
    answers = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(answers) == ["abc", "def", "x" * 400]


def _stop_after_two(server: Served, records: Path) -> None:
    """Stop once the two short answers are kept, while the long one (20 seconds of sweeps) is being written."""
    until(lambda: records.exists() and records.read_text().count("\n") == 2)
    server.models.begin_stopping()


def test_what_needs_the_models_files_is_refused(run: Run) -> None:
    for option in (["--dry-run"], ["--on-too-long", "left"], ["--engine", "ray"]):
        assert run("generate", "-p", "abc", "--connect", "here", *option).code == 2


def test_a_refusal_keeps_the_code_that_scripts_know(letters: Served) -> None:
    with pytest.raises(ServerRefusal) as refused:
        list(served(letters).stream([{"role": "user", "content": "x" * 2000}], SamplingParams()))
    assert refused.value.code == "context_length_exceeded"
