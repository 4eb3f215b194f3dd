"""Thoughts and calls in results of a batch, as Qwen3 writes them: real tokenizer and template, a tiny writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

import specexec
from cli.app import main
from specexec.engine.engine import Engine
from tests.command_line import stays_open
from tests.writer import writer

THOUGHT = "I must look."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
QWEN3 = f"<think>\n{THOUGHT}\n</think>\n\nLet me look.\n{CALL}"
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
ASKED = [{"role": "user", "content": "Rain in Zürich?"}]
LINES: list[dict[str, Any]] = [
    {"id": "ours", "messages": ASKED, "tools": TOOLS},
    {"id": "text", "prompt": "Rain in Zürich?"},
    {"id": "forced", "messages": ASKED, "tools": TOOLS, "tool_choice": "required"},
    {"id": "forbidden", "messages": ASKED, "tools": TOOLS, "tool_choice": "none"},
    {"id": "cut", "messages": ASKED, "max_tokens": 4},
    {"id": "raw", "prompt": [1, 2, 3], "max_tokens": 2},
    {"id": "beyond", "prompt": [10**6]},
    {"id": "bad", "messages": ASKED, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
    {"custom_id": "theirs", "url": "/v1/chat/completions", "body": {"messages": ASKED, "tools": TOOLS}},
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> str:
    return str(writer("qwen3", QWEN3, "<|im_start|>assistant\n"))


@pytest.fixture(scope="module")
def loaded(model: str) -> Iterator[Engine]:
    with specexec.load(model, drafter="none", dtype="f32") as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine for the commands of several tests."""
    stays_open(monkeypatch, loaded)


def run(model: str, folder: Path, *more: str) -> dict[str, dict[str, Any]]:
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    common = ["-q", "generate", str(source), "-m", model, "-d", "none", "--dtype", "f32", "-t", "0", "-n", "80"]
    assert main([*common, "-o", str(output), *more]) == 8
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {str(line.get("custom_id", line.get("id"))): line for line in found}


@pytest.mark.usefixtures("engine")
def test_thoughts_and_calls_are_fields_of_a_record(model: str, tmp_path: Path) -> None:
    found = run(model, tmp_path)
    for name in ("ours", "text", "theirs"):
        record = found[name]
        assert (record["text"], record["reasoning"]) == ("Let me look.", THOUGHT)
        assert record["finish_reason"] == "tool_calls"
        (call,) = record["tool_calls"]
        assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Zürich", "days": 2})
    forced = found["forced"]
    assert forced["tool_calls"][0]["name"] == "get_weather"
    assert forced["reasoning"] == THOUGHT
    forbidden = found["forbidden"]
    assert (forbidden["text"], forbidden["reasoning"]) == (f"Let me look.\n{CALL}", THOUGHT)
    assert (forbidden["finish_reason"], forbidden["tool_calls"]) == ("stop", None)
    cut = found["cut"]
    assert (cut["text"], cut["finish_reason"], cut["tool_calls"]) == ("", "length", None)
    assert (cut["limit"], found["ours"]["limit"]) == ("max_tokens", None)
    assert THOUGHT.startswith(cut["reasoning"])
    assert found["raw"]["error"] is None
    assert "1000000" in found["beyond"]["error"]["message"]
    assert "tool_choice" in found["bad"]["error"]["message"]


@pytest.mark.usefixtures("engine")
def test_thoughts_and_calls_of_openais_lines_have_openais_shape(model: str, tmp_path: Path) -> None:
    found = run(model, tmp_path, "--output-format", "openai-batch")
    body = found["theirs"]["response"]["body"]
    message = ChatCompletion.model_validate(body).choices[0].message
    assert message.content == "Let me look."
    assert message.tool_calls
    assert message.tool_calls[0].id
    assert body["choices"][0]["message"]["reasoning_content"] == THOUGHT
    assert body["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.usefixtures("engine")
def test_thoughts_that_a_plain_run_leaves_out_are_said_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["generate", "-m", model, "-d", "none", "--dtype", "f32", "-t", "0", "-n", "80"]
    asked = ["-p", "Rain in Zürich?", "-p", "And in Bern?"]
    assert main([*run, *asked]) == 0
    told = capsys.readouterr()
    assert told.err.count("thoughts are left out here; --json or -o FILE keeps them") == 1
    assert THOUGHT not in told.out
    for more in (["-q", *run, *asked], [*run, *asked, "--json"]):
        assert main(more) == 0
        assert "left out" not in capsys.readouterr().err


def test_nothing_is_shown_after_a_stop_text_of_the_models_own(model: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    wishes = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps({**wishes, "stop_strings": ["me lo"]}))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": "silent", "messages": ASKED},
        {"id": "own", "messages": ASKED, "stop": ["ok"]},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["-q", "generate", str(source), "-m", str(own), "-d", "none", "--dtype", "f32", "-t", "0", "-n", "80"]
    assert main([*run, "-o", str(output)]) == 0
    found = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert (found["silent"]["text"], found["silent"]["reasoning"]) == ("Let ", THOUGHT)
    assert found["own"]["reasoning"] == "I must lo"


def test_a_run_and_a_line_say_how_much_to_think(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[dict[str, Any]] = [
        {"id": "runs", "messages": ASKED},
        {"id": "own", "messages": ASKED, "reasoning_effort": "high"},
        {"id": "told", "messages": ASKED, "chat_template_kwargs": {"enable_thinking": True}},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["generate", str(source), "-m", model, "-d", "none", "--dtype", "f32", "-t", "0", "-n", "2"]
    assert main([*run, "-o", str(output), "--think", "off"]) == 0
    assert "think off: the chat template gets enable_thinking=False" in capsys.readouterr().err
    found = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    tokens = {name: record["usage"]["prompt_tokens"] for name, record in found.items()}
    assert tokens["own"] == tokens["told"]
    assert tokens["runs"] == tokens["own"] + 4, "an empty thought: <think>, blank lines, </think>, blank lines"
    assert main([*run, "-o", str(output), "--think", "on", "--resume"]) == 9
