"""OpenAI's batch lines on a real engine: what comes out is what the openai package's own types expect."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from cli.app import main

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 6}
SCHEMA = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"],
          "additionalProperties": False}  # fmt: skip
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLED = {"role": "assistant", "content": None,
          "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip

COMPLETIONS = ("plain", "several", "echo")
LINES: list[dict[str, Any]] = [
    {"custom_id": "a", "url": CHAT, "body": {"model": "gpt-4o-mini", **ASKED}},
    {"custom_id": "schema", "url": CHAT, "body": {**ASKED, "max_tokens": 30, "response_format":
        {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}}},
    {"custom_id": "image", "url": CHAT, "body": {**ASKED, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}},
    {"custom_id": "tools", "url": CHAT, "body": {**ASKED, "tools": TOOLS}},
    {"custom_id": "logprobs", "url": CHAT, "body": {**ASKED, "logprobs": True, "top_logprobs": 2}},
    {"custom_id": "plain", "url": PLAIN, "body": {"model": "m", "prompt": "The sky is", "max_tokens": 4}},
    {"custom_id": "several", "url": PLAIN, "body": {"prompt": ["The sky", "The sea"], "max_tokens": 4, "n": 2}},
    {"custom_id": "echo", "url": PLAIN, "body": {"prompt": "The sky", "max_tokens": 3, "echo": True, "logprobs": 1}},
    {"custom_id": "embedding", "url": "/v1/embeddings", "body": {"model": "m", "input": "hello"}},
    {"custom_id": "n2", "url": CHAT, "body": {**ASKED, "n": 2}},
    {"custom_id": "nulls", "url": CHAT, "body": {**ASKED, "stop": None, "tools": None, "stream": False, "seed": None}},
    {"custom_id": "stream", "url": CHAT, "body": {**ASKED, "stream": True}},
    {"custom_id": "a", "url": CHAT, "body": ASKED},
    {"custom_id": 7, "url": CHAT, "body": ASKED},
    {"custom_id": "7", "url": CHAT, "body": ASKED},
    {"custom_id": "bad_id", "url": PLAIN, "body": {"prompt": [5, 10**6], "max_tokens": 2}},
    {"custom_id": "nothing", "url": PLAIN, "body": {"prompt": []}},
    {"custom_id": "nothing2", "url": PLAIN, "body": {"prompt": [[]], "echo": True, "logprobs": 1}},
    {"custom_id": "below", "url": PLAIN, "body": {"prompt": [5, -1]}},
    {"custom_id": "history", "url": CHAT, "body": {**ASKED, "messages": [*ASKED["messages"], CALLED,
        {"role": "tool", "tool_call_id": "c", "content": "ok"}]}},
]  # fmt: skip
FAILED = {"image": "messages", "embedding": "url", "stream": "stream", "a#2": "", "7#2": "", "bad_id": "1000000",
          "nothing": "empty", "nothing2": "empty", "below": "-1",
          "tools": "tools", "history": "not tool"}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("openai")
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"method": "POST", **line}) + "\n" for line in LINES))
    run = ["-q", "generate", str(source), "-o", str(output), "--output-format", "openai-batch", "--seed", "1"]
    assert main([*run, "--budget", "8", "-t", "0.8"]) == 8
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(LINES)
    before = output.read_bytes()
    assert main([*run, "--budget", "8", "-t", "0.8", "--resume"]) == 8
    assert output.read_bytes() == before
    return {line["custom_id"]: line for line in lines}


def typed(name: str, line: dict[str, Any]) -> Completion | ChatCompletion:
    """The answer of a line, as openai's types read it."""
    body = deepcopy(line["response"]["body"])
    if name == "echo":  # the first token has no probability; the API says null there, which its types do not know
        for values in (body["choices"][0]["logprobs"][key] for key in ("token_logprobs", "top_logprobs")):
            assert values.pop(0) is None
    return (Completion if name in COMPLETIONS else ChatCompletion).model_validate(body)


def test_answers_are_what_openais_own_types_expect(found: dict[str, dict[str, Any]]) -> None:
    for name, line in found.items():
        if name in FAILED:
            continue
        assert line["error"] is None, line
        assert line["id"].startswith("batch_req_")
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"]
        answer = typed(name, line)
        assert answer.id.startswith("cmpl-" if name in COMPLETIONS else "chatcmpl-")
        assert answer.created > 1_700_000_000
        assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}
    assert len({line["id"] for line in found.values()}) == len(LINES)


def test_failed_lines_have_openais_shape_and_name_what_was_asked(found: dict[str, dict[str, Any]]) -> None:
    for name, says in FAILED.items():
        line = found[name]
        assert says in line["error"]["message"]
        if name in ("a#2", "7#2"):
            assert (line["response"], line["error"]["code"]) == (None, "duplicate_id")
            continue
        assert line["response"]["status_code"] == 400
        error = ErrorObject.model_validate(line["response"]["body"]["error"])
        assert (error.type, says in f"{error.message} {error.param}") == ("invalid_request_error", True)


def test_choices_schemas_and_probabilities_are_as_asked(found: dict[str, dict[str, Any]]) -> None:
    def choices(name: str) -> list[Any]:
        return list(typed(name, found[name]).choices)

    assert json.loads(choices("schema")[0].message.content)["c"] in ("red", "blue")
    assert [choice.index for choice in choices("several")] == [0, 1, 2, 3]
    assert len({choice.seed for choice in choices("n2")}) == 2
    for token in choices("logprobs")[0].logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob <= 0
    echo = choices("echo")[0]
    assert echo.text.startswith("The sky")
    assert "".join(echo.logprobs.tokens) == echo.text
    assert found["several"]["response"]["body"]["usage"]["completion_tokens"] == 4 * 4
