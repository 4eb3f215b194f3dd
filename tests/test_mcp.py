"""Tools of MCP servers in conversations: offered, called when allowed, and their results read by the model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
import pytest
import uvicorn
from starlette.types import ASGIApp

from cli.app import main
from cli.chat.archive import Archive, Record, sessions_folder
from cli.chat.room import OnFull, results_with_room
from cli.chat.session import Session
from cli.connect.engine import ServedEngine
from cli.connect.models import loaded_model
from cli.connect.server import Server
from cli.mcp import toolbox
from cli.mcp.config import McpServer, meant, user_servers
from cli.mcp.options import McpOptions
from cli.mcp.servers import CallFailed, McpServers
from cli.mcp.toolbox import DENIED, STOPPED, Results, Toolbox
from cli.shared.errors import BadConfig, McpFailed, ServerRefusal
from cli.shared.options import EngineOptions
from cli.terminal.screen import Screen
from specexec.errors import BadGrammar, BadMessages
from specexec.sampling.lark import lark
from specexec.sampling.params import SamplingParams
from specexec.text.conversation import Conversation
from specexec.text.dialogue import Dialogue
from specexec.text.formats.rules import Whole
from specexec.text.messages import Message
from tests.agent import EMPTY, MISSING, PARAMETERS, TASK
from tests.serving import Served
from tests.waiting import until

SCRIPT = Path(__file__).with_name("mcp_server.py")
SERVER = McpServer("files", sys.executable, (str(SCRIPT),), {"SAYS": "No such file"})
TOOL: Message = {"type": "function", "function": {"name": "read_file", "parameters": PARAMETERS}}
GREEDY = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def files() -> Iterator[McpServers]:
    """A running server."""
    with McpServers([SERVER], timeout_s=30) as servers:
        servers.start(lambda _: nullcontext())
        yield servers


def test_what_a_model_calls_is_run_and_it_reads_the_results(
    agent: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tools of a file's server; the answer alone is on stdout, the server is gone at the end."""
    place = tmp_path / "pid"
    server = {"command": sys.executable, "args": [str(SCRIPT), str(place)], "env": {"SAYS": "${WORDS:-No such file}"}}
    other = {"command": "not-there", "disabled": True}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"mine": {**server, "icon": "i"}, "not": other}}))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/tools\n{TASK}\n"))
    code = main(["chat", "--connect", agent.url, "-t", "0", "--mcp", str(tmp_path / "mcp.json"), "--yes"])
    out, err = capsys.readouterr()
    assert (code, out) == (0, "Let me look.\nThere was no bug at all.\n")
    assert "Note: mine: without effect here: icon\n" in err
    assert "tools of mine (3); /tools lists them\n" in err
    assert "  read_file(path)  Read a file.\n" in err
    said = [line for line in err.splitlines() if line.startswith(("→", "  ←"))]
    a, b = (f"→ read_file({json.dumps({'path': f'{name}.txt'})})" for name in "ab")
    assert said == [a, f"  ← {EMPTY}", a, b, f"  ← {EMPTY}", f"  ← read_file failed: {MISSING}"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)
    kept = next(one for one in Archive(sessions_folder()).everything() if isinstance(one, Record))
    roles = " ".join(str(message["role"]) for message in kept.messages)
    assert roles == "user assistant tool assistant tool tool assistant"
    calls = [call["id"] for message in kept.messages for call in message.get("tool_calls", [])]  # type: ignore[attr-defined]
    assert [message["tool_call_id"] for message in kept.messages if message["role"] == "tool"] == calls


def test_tools_are_offered_alike_here_and_by_a_server(agent: Served) -> None:
    engine = agent.worker.engine
    served = ServedEngine(loaded_model(Server(agent.url), "", False, Screen(quiet=True)), EngineOptions())
    told: list[list[Message]] = []
    talks: list[Dialogue] = [engine.conversation("Help."), served.conversation("Help.")]
    for talk in talks:
        talk.tools = (TOOL,)
        assert "".join(burst.piece.content for burst in talk.send(TASK, GREEDY)).strip() == "Let me look."
        made: dict[str, object] = talk.messages[-1]["tool_calls"][0]  # type: ignore[index]
        result: Message = {"role": "tool", "tool_call_id": made["id"], "content": MISSING}
        assert "There was no bug at all." in "".join(burst.piece.content for burst in talk.go_on([result], GREEDY))
        made["id"] = result["tool_call_id"] = ""
        told.append(talk.messages)
    assert told[0] == told[1]
    here, there = talks
    assert here.rendered == there.rendered  # type: ignore[attr-defined]
    assert '"name": "read_file"' in here.rendered  # type: ignore[attr-defined]
    assert here.tokens_used == there.tokens_used  # type: ignore[attr-defined]


def test_results_stay_when_the_answer_to_them_does_not_begin(agent: Served) -> None:
    talk = agent.worker.engine.conversation()
    talk.messages = [{"role": "user", "content": TASK}, {"role": "assistant", "content": "I look."}]
    result: Message = {"role": "tool", "tool_call_id": "1", "content": MISSING}
    talk.go_on([result], GREEDY)  # and nobody reads it
    assert (talk.messages[-1], talk.unanswered) == (result, None)
    assert talk.undo()
    assert talk.messages == []


def test_texts_follow_a_schema_and_calls_are_possible_beside_it(agent: Served) -> None:
    talk = agent.worker.engine.conversation()
    talk.whole = Whole({"enum": ["fine"]})
    list(talk.send("Hello", GREEDY))
    assert json.loads(str(talk.messages[-1]["content"])) == "fine"
    talk.tools = (TOOL,)
    list(talk.send(EMPTY, GREEDY))
    assert talk.messages[-1]["tool_calls"][0]["function"]["name"] == "read_file"  # type: ignore[index]


@pytest.mark.parametrize("grammar", ['root ::= "fine" [0-9] "!"\n', 'start: "fine" DIGIT "!"\nDIGIT: /[0-9]/\n'])
def test_texts_follow_a_written_grammar_here_and_by_a_server(agent: Served, grammar: str) -> None:
    served = ServedEngine(loaded_model(Server(agent.url), "", False, Screen(quiet=True)), EngineOptions())
    said = []
    for talk in (agent.worker.engine.conversation(), served.conversation()):
        talk.whole = Whole(grammar=lark(grammar))
        list(talk.send("Hello", GREEDY))
        said.append(str(talk.messages[-1]["content"]))
    assert re.fullmatch(r"fine\d!", said[0])
    assert said[1] == said[0]


def test_a_grammar_on_the_line_is_followed_or_refused_before_a_model_is_loaded(
    agent: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    asking = ["chat", "--connect", agent.url, "-t", "0", "-p", "Hi", "--grammar"]
    assert main([*asking, 'root ::= "so" " be it"?']) == 0
    assert capsys.readouterr().out.strip() in ("so", "so be it")
    assert main([*asking, "start: nothing"]) == 2
    assert "the grammar cannot be used" in capsys.readouterr().err
    monkeypatch.setattr("cli.chat.command.engines_of", lambda *_: pytest.fail("loaded"))
    assert main([*asking, "root ::= nothing"]) == 2
    assert (
        "cannot be read as GBNF (root ::= …) or Lark (start: …): Rule 'nothing' not found." in capsys.readouterr().err
    )
    assert main([*asking, 'start: "x"', "--schema", "{}"]) == 2


@pytest.mark.parametrize("schema", [{"type": 3}, {"type": "array", "uniqueItems": True}])
def test_a_schema_that_cannot_be_followed_is_refused_before_a_model_is_loaded_and_by_one_that_is(
    agent: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], schema: dict[str, object]
) -> None:
    monkeypatch.setattr("cli.chat.command.running_engine", lambda *_, **__: pytest.fail("loaded"))
    assert main(["chat", "-p", "Hi", "--schema", json.dumps(schema)]) == 2
    assert "the schema cannot be followed: /" in capsys.readouterr().err
    talk = agent.worker.engine.conversation()
    talk.whole = Whole(schema)
    for tools in ((), (TOOL,)):
        talk.tools = tools
        with pytest.raises(BadGrammar, match="the schema cannot be followed: /"):
            list(talk.send("Hello", GREEDY))
    assert talk.messages == []


def test_an_answer_of_a_schema_that_was_cut_short_goes_on_where_it_was(agent: Served) -> None:
    served = ServedEngine(loaded_model(Server(agent.url), "", False, Screen(quiet=True)), EngineOptions())
    word = "fine weather all over the country"
    for talk in (agent.worker.engine.conversation(), served.conversation()):
        talk.whole = Whole({"type": "object", "properties": {"says": {"enum": [word]}}, "required": ["says"]})
        whole = sum(len(burst.tokens) for burst in talk.send("Hello", GREEDY))
        list(talk.retry(replace(GREEDY, max_tokens=whole - 4)))
        begun = str(talk.messages[-1]["content"])
        assert begun
        assert talk.can_proceed
        list(talk.proceed(GREEDY))
        assert str(talk.messages[-1]["content"]).startswith(begun)
        assert json.loads(str(talk.messages[-1]["content"])) == {"says": word}


def test_a_beginning_that_no_answer_has_is_refused(agent: Served) -> None:
    served = ServedEngine(loaded_model(Server(agent.url), "", False, Screen(quiet=True)), EngineOptions())
    begun: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, "}]
    with pytest.raises(ServerRefusal, match="no answer that follows the grammar begins so"):
        list(served.stream(begun, GREEDY, whole=Whole({"enum": ["fine"]}), proceed=True))


def test_a_model_that_writes_no_calls_is_not_given_tools(agent: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = agent.worker.engine.conversation()
    monkeypatch.setattr(agent.worker.engine.encoding.tokenizer, "chat_template", "{{ messages[0].content }}")
    talk.tools = (TOOL,)
    with pytest.raises(BadMessages, match=r"tools cannot be called: .*leaves tool calls out"):
        list(talk.send(TASK, GREEDY))


def test_what_a_model_refuses_while_servers_run_is_said_as_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code = main(["chat", "-p", "Hi", "--mcp", f"{sys.executable} {SCRIPT}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (code, said) == (7, "Error: tools cannot be called: the model's chat template leaves tool calls out.")


def test_results_become_text_and_what_goes_wrong_says_why(files: McpServers) -> None:
    read, wait, picture = files.tools
    assert files.call(read, {"path": "a.txt"}) == EMPTY
    assert files.call(picture, {}) == "[image/png, 3 B, left out]\n[the plan: file:///plan]"
    with pytest.raises(CallFailed, match=MISSING):
        files.call(read, {"path": "b.txt"})
    with pytest.raises(CallFailed, match="path"):
        files.call(read, {})
    assert files.call(wait, {"seconds": 0}) == "late"


@contextmanager
def elsewhere(app: ASGIApp) -> Iterator[str]:
    """An application on a free port, for the length of the block: its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(("transport", "path"), [("http", "/mcp"), ("sse", "/sse")])
def test_a_server_that_runs_elsewhere_is_asked_over_http(
    transport: Literal["http", "sse"], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.mcp_server import server

    monkeypatch.setenv("SAYS", "No such file")
    app = server.streamable_http_app() if transport == "http" else server.sse_app()
    with elsewhere(app) as url:
        with McpServers([McpServer(url=url + path, transport=transport)], timeout_s=30) as servers:
            servers.start(lambda _: nullcontext())
            assert [(tool.server.name, tool.name) for tool in servers.tools] == [
                ("files", name) for name in ("read_file", "wait", "picture")
            ]
            assert servers.call(servers.tools[0], {"path": "a.txt"}) == EMPTY
            with pytest.raises(CallFailed, match=MISSING):
                servers.call(servers.tools[0], {"path": "b.txt"})
        with (
            pytest.raises(McpFailed, match=f"{path}x cannot be used"),
            McpServers([McpServer(url=f"{url}{path}x", transport=transport)], timeout_s=30) as servers,
        ):
            servers.start(lambda _: nullcontext())


def test_a_call_ends_in_time_or_when_the_user_wants(
    files: McpServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, wait, _ = files.tools
    monkeypatch.setattr(files, "_timeout_s", 0.2)
    with pytest.raises(CallFailed, match="timed out"):
        files.call(wait, {"seconds": 3})
    monkeypatch.setattr(files, "_timeout_s", 30)
    box = Toolbox(files, McpOptions(everything=True), Screen(quiet=True))
    begun = tmp_path / "begun"

    def interrupt() -> None:
        until(begun.exists)
        os.kill(os.getpid(), signal.SIGINT)

    press = threading.Thread(target=interrupt)
    press.start()
    calls = [call("wait", {"seconds": 20, "begun": str(begun)}), call("read_file", {"path": "a.txt"})]
    results = box.run(calls, 1000)
    press.join()
    assert results.stopped
    assert [message["content"] for message in results.messages] == [STOPPED, STOPPED]
    assert files.call(read, {"path": "a.txt"}) == EMPTY  # the server still answers


def call(name: str, arguments: object) -> Message:
    function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
    return {"id": f"of {name}", "type": "function", "function": function}


def test_every_tool_needs_consent_once(
    files: McpServers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = call("read_file", {"path": "a.txt"})

    def said(box: Toolbox) -> list[object]:
        return [message["content"] for message in box.run([read], 1000).messages]

    assert said(Toolbox(files, McpOptions(), Screen())) == [DENIED]
    assert "nobody can be asked here; --mcp-allow read_file" in capsys.readouterr().err
    for allowed in ("read_file", "files"):
        assert said(Toolbox(files, McpOptions(allowed=(allowed,)), Screen(quiet=True))) == [EMPTY]
    answers = iter("noy")
    monkeypatch.setattr(toolbox, "can_ask", lambda: True)
    monkeypatch.setattr(toolbox, "asked", lambda _: next(answers))
    box = Toolbox(files, McpOptions(), Screen(quiet=True))
    assert [said(box) for _ in range(4)] == [[DENIED], [EMPTY], [EMPTY], [EMPTY]]
    with pytest.raises(StopIteration):
        box.run([call("picture", {})], 1000)  # another tool is asked about anew


def test_calls_that_cannot_be_made_are_answered_with_the_reason(files: McpServers) -> None:
    box = Toolbox(files, McpOptions(everything=True), Screen(quiet=True))
    wrong = [call("write", {}), call("wait", "{"), call("wait", "[]"), call("read_file", {"path": "a.txt"})]
    results = box.run(wrong, 8).messages
    assert [str(message["content"])[:8] for message in results] == ["Error: t", "Error: t", "Error: t", EMPTY[:8]]
    assert "more characters are left out" in str(results[3]["content"])
    assert [message["tool_call_id"] for message in results] == [one["id"] for one in wrong]


def test_results_that_fill_the_context_make_room_or_are_cut_and_the_round_goes_on(
    agent: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = agent.worker.engine
    monkeypatch.setattr(engine, "context", 500)
    said = ("long " * 200, "short")
    results: list[Message] = [{"role": "tool", "tool_call_id": "1", "content": text} for text in said]
    asking: Message = {"role": "assistant", "content": "", "tool_calls": [call("read_file", {"path": "a.txt"})]}
    turn: list[Message] = [{"role": "user", "content": "Go on. " * 40}, asking]

    def talk(on_full: OnFull) -> Session:
        conversation = engine.conversation()
        conversation.messages = [turn[0], {"role": "assistant", "content": "Yes."}, *turn]
        assert conversation.tokens_with(results) > 500, "more than the context"
        return Session(engine, conversation, Screen(), replace(GREEDY, max_tokens=50), on_full=on_full)

    one = talk("stop")
    fitting = results_with_room(one, Results(900, results))
    assert isinstance(one.conversation, Conversation)
    assert fitting is not None
    assert str(fitting[0]["content"]).startswith("long long")
    assert fitting[1] == results[1]
    kept = str(fitting[0]["content"]).partition("\n")[0]
    assert str(fitting[0]["content"]) == f"{kept}\n[{1000 - len(kept)} more characters are left out]", "cut once"
    assert one.conversation.tokens_with(fitting) in range(435, 451), "as much as there is room for, and an answer"
    assert "the context of 500 tokens is nearly full: only the first" in capsys.readouterr().err
    assert list(one.conversation.go_on(fitting, replace(GREEDY, max_tokens=50)))

    other = talk("drop-oldest-turns")
    assert results_with_room(other, Results(1000, results)) == results
    assert other.conversation.left_out.messages == 2, "the earlier turn, not the one that goes on"
    assert "the model no longer reads the first 2" in capsys.readouterr().err


def test_tools_of_one_name_are_told_apart_by_their_servers(files: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    read = files.tools[0]
    other = replace(read, server=McpServer("my/other", url="http://x"))
    monkeypatch.setattr(files, "tools", [read, other, replace(read, name="a/b c")])
    box = Toolbox(files, McpOptions(), Screen(quiet=True))
    assert [*box.tools] == ["files_read_file", "my_other_read_file", "a_b_c"]
    assert [tool["function"]["name"] for tool in box.definitions] == [*box.tools]  # type: ignore[index]


def test_servers_are_named_typed_or_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    mine = {"memory": {"command": "sh", "args": ["-c", "x"], "cwd": "~", "autoApprove": ["recall"]}}
    user_servers().parent.mkdir(parents=True)
    user_servers().write_text(json.dumps({"mcpServers": mine}))
    (tmp_path / "m.json").write_text(
        json.dumps({"servers": {"web": {"type": "http", "url": "https://x/mcp", "headers": {"A": "B ${env:TOKEN}"}}}})
    )
    found = meant(["memory", "sh -c 'y z'", str(tmp_path / "m.json"), "http://127.0.0.1:9/mcp", "memory"])
    assert found == [
        McpServer("memory", "sh", ("-c", "x"), cwd=Path.home(), allowed=("recall",)),
        McpServer(command="sh", args=("-c", "y z")),
        McpServer("web", url="https://x/mcp", headers={"A": "B secret"}, transport="http"),
        McpServer(url="http://127.0.0.1:9/mcp", transport="http"),
    ]
    with pytest.raises(McpFailed, match="no MCP server 'memori'") as refused:
        meant(["memori"])
    assert refused.value.hint == "--mcp memory"
    with pytest.raises(click.UsageError, match="No closing quotation"):
        meant(["sh 'x"])
    for nothing in ("", "~nobody-of-this-name/mcp.json"):
        with pytest.raises(McpFailed, match="no such command, address or file"):
            meant([nothing])


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "names no servers"),
        ('{"mcpServers": {"x": 1}}', "x is not an object"),
        ('{"mcpServers": {"x": {}}}', "either a command or a url"),
        ('{"mcpServers": {"x": {"command": "a", "url": "b"}}}', "either a command or a url"),
        ('{"mcpServers": {"x": {"command": "a", "args": "b"}}}', "args is not a list"),
        ('{"mcpServers": {"x": {"command": "a", "env": {"b": 1}}}}', "env is not an object of texts"),
        ('{"mcpServers": {"x": {"command": "a", "type": "http"}}}', "its type is 'http'"),
        ('{"mcpServers": {"x": {"url": "a", "type": "ws"}}}', "its type is 'ws'"),
        ('{"mcpServers": {"x": {"command": "${NOT_THERE_1}"}}}', "no variable NOT_THERE_1"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_what_is_wrong(tmp_path: Path, told: str, says: str) -> None:
    (tmp_path / "m.json").write_text(told)
    with pytest.raises(BadConfig, match=says):
        meant([str(tmp_path / "m.json")])


@pytest.mark.parametrize(
    ("program", "says"),
    [("import sys; sys.exit('no key is set')", "no key is set"), ("print('hello'); print('world')", "")],
)
def test_a_server_that_cannot_be_used_is_refused_in_its_own_words(
    program: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(McpFailed, match="the MCP server bad cannot be used") as refused,
        McpServers([McpServer("bad", sys.executable, ("-c", program))], timeout_s=30, start_s=30) as servers,
    ):
        servers.start(lambda _: nullcontext())
    assert says in str(refused.value.why)
    assert not caplog.records, "no traceback of the package"


def test_what_is_missing_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.engine.open.open_engine", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["chat", "--mcp", "not-there", "-p", "Hi"]) == 6
    assert "no MCP server 'not-there'" in capsys.readouterr().err
    known: Callable[[str], object] = lambda name: None  # noqa: E731
    monkeypatch.setattr("cli.mcp.servers.find_spec", known)
    assert main(["chat", "--mcp", "sh", "-p", "Hi"]) == 2
    assert "-m pip install 'specexec[mcp]'" in capsys.readouterr().err
