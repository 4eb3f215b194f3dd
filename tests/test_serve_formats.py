"""Thoughts and calls over HTTP, as Qwen3 writes them: real tokenizer and template, a tiny writer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import specexec
from cli.serve.command import _warm
from cli.shared.thinking import ask_to_think
from cli.terminal.screen import Screen
from tests.serving import Served, serving
from tests.waiting import until
from tests.writer import ROWS, writer

THOUGHT = "I must look."
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
QWEN3 = f"<think>\n{THOUGHT}\n</think>\n\nLet me look.\n{CALLS}"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Rain or sun?", "parameters": PARAMETERS},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
QUESTION: list[Any] = [{"role": "user", "content": "Rain in Zürich?"}]


@pytest.fixture(scope="module")
def qwen() -> Iterator[Served]:
    folder = writer("qwen3", QWEN3, "<|im_start|>assistant\n")
    with serving(lambda: specexec.load(str(folder), drafter="none", dtype="f32")) as served:
        yield served


def ask(server: Served, messages: list[Any] = QUESTION, **more: object) -> Any:
    with server.http as client:
        body = {"messages": messages, "temperature": 0, "max_tokens": 80, **more}
        return client.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def answer(qwen: Served) -> Any:
    """One answer with everything in it."""
    return ask(qwen, tools=TOOLS, logprobs=True).json()


def test_content_thought_and_calls_come_apart(answer: Any) -> None:
    choice = answer["choices"][0]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("Let me look.", "tool_calls")
    assert message["reasoning_content"] == message["reasoning"] == THOUGHT
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "get_time"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich", "days": 2}
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_a_stream_says_the_same_in_the_shape_that_clients_add_up(qwen: Served) -> None:
    with qwen.openai() as client:
        create: Any = client.chat.completions.create
        asked = {"model": "letters", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 80}
        chunks = list(create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == THOUGHT
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name, call.type) for call in calls] == [
        (0, "get_weather", "function"),
        (1, "get_time", "function"),
    ]
    assert json.loads(calls[0].function.arguments) == {"city": "Zürich", "days": 2}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"get_weather", "get_time"}), ({"type": "function", "function": {"name": "get_time"}}, {"get_time"})],
)
def test_a_call_that_must_come_comes_after_the_thought(qwen: Served, choice: object, names: set[str]) -> None:
    message = ask(qwen, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == THOUGHT
    (call,) = message["tool_calls"]
    assert call["function"]["name"] in names


def test_tools_that_must_not_be_called_are_not_offered(qwen: Served) -> None:
    without = ask(qwen, max_tokens=1).json()
    forbidden = ask(qwen, tools=TOOLS, tool_choice="none", max_tokens=1).json()
    assert forbidden["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]


def test_a_call_that_was_forbidden_is_text(qwen: Served) -> None:
    choice = ask(qwen, tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)
    assert choice["message"]["content"] == f"Let me look.\n{CALLS}"
    assert choice["message"]["reasoning_content"] == THOUGHT


def test_a_call_cut_by_max_tokens_is_no_call_and_nothing_of_it_is_lost(qwen: Served) -> None:
    encoding = qwen.worker.engine.encoding
    most = len(encoding.encode_rest(QWEN3[: QWEN3.index('", "arguments')]))
    choice = ask(qwen, tools=TOOLS, max_tokens=most).json()["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert choice["message"]["content"] == 'Let me look.\n<tool_call>\n{"name": "get_weather'


def test_logprobs_name_every_token_of_thought_content_and_calls(qwen: Served, answer: Any) -> None:
    encoding = qwen.worker.engine.encoding
    told = answer["choices"][0]["logprobs"]["content"]
    assert len(told) == answer["usage"]["completion_tokens"]
    assert "".join(one["token"] for one in told) == QWEN3 + "<|im_end|>"
    assert len(told) == len(encoding.encode_rest(QWEN3)) + 1


def test_the_answer_and_its_results_go_back_as_history(qwen: Served, answer: Any) -> None:
    """What a client sends next is what the model wrote, so the template gives the model its own words."""
    message = answer["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in message["tool_calls"]]
    again = ask(qwen, [*QUESTION, message, *results], tools=TOOLS, max_tokens=1)
    assert again.status_code == 200, again.text
    rendered = qwen.worker.engine.encoding.render([*QUESTION, message, *results])
    assert CALLS in rendered


def test_tools_reach_the_template_as_they_were_sent(qwen: Served) -> None:
    odd = {
        "function": {"strict": None, "parameters": {"required": [], "type": "object"}, "name": "f"},
        "type": "function",
    }
    encoding = qwen.worker.engine.encoding
    truth: Any = encoding.tokenizer.apply_chat_template(QUESTION, tools=[odd], add_generation_prompt=True)
    told = ask(qwen, tools=[odd], max_tokens=1).json()
    assert told["usage"]["prompt_tokens"] == len(truth["input_ids"])


def test_a_bad_keyword_or_tool_costs_only_itself_and_is_said(qwen: Served) -> None:
    lookahead = {"type": "object", "properties": {"city": {"type": "string", "pattern": "^(?=Z)Z.*$"},
                 "days": {"type": "integer"}}, "required": ["city"]}  # fmt: skip
    bad = {"type": "function", "function": {"name": "get_weather", "parameters": lookahead, "strict": True}}
    answer = ask(qwen, tools=[bad, {"type": "web_search"}, TIME], surprise=1)
    assert answer.status_code == 200, answer.text
    names = {call["function"]["name"] for call in answer.json()["choices"][0]["message"]["tool_calls"]}
    assert names <= {"get_weather", "get_time"}
    notes = answer.headers["x-specexec-notes"]
    assert "web_search" in notes
    assert "pattern" in notes
    assert "surprise" in notes
    until(lambda: any("web_search" in line and "pattern" in line for line in qwen.log))


def test_thoughts_can_be_turned_off(qwen: Served) -> None:
    off = ask(qwen, reasoning_effort="none", max_tokens=1)
    same = ask(qwen, chat_template_kwargs={"enable_thinking": False}, max_tokens=1)
    on = ask(qwen, max_tokens=1)
    counts = [answer.json()["usage"]["prompt_tokens"] for answer in (off, same, on)]
    assert counts[0] == counts[1] > counts[2]
    assert "x-specexec-notes" not in off.headers


def test_json_is_bound_after_the_thought(qwen: Served) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = ask(qwen, response_format=shape).json()["choices"][0]["message"]
    assert message["reasoning_content"] == THOUGHT
    assert set(json.loads(message["content"])) == {"ok"}


def test_control_tokens_that_a_user_spells_stay_text_unless_that_is_wished(qwen: Served) -> None:
    spelled: list[Any] = [{"role": "user", "content": "<|im_end|>"}]
    encoding = qwen.worker.engine.encoding
    real: Any = encoding.tokenizer.apply_chat_template(spelled, add_generation_prompt=True)
    literal = ask(qwen, spelled, max_tokens=1).json()["usage"]["prompt_tokens"]
    wished = ask(qwen, spelled, max_tokens=1, allow_control_tokens=True).json()["usage"]["prompt_tokens"]
    assert wished == len(real["input_ids"]) < literal


def test_a_request_that_says_nothing_of_thinking_has_the_servers_level(
    qwen: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    def prompt_tokens(**more: Any) -> int:
        return int(ask(qwen, max_tokens=1, **more).json()["usage"]["prompt_tokens"])

    plain, engine = prompt_tokens(), qwen.worker.engine
    _warm(engine, "off", Screen())
    assert "think off: the chat template gets enable_thinking=False" in capsys.readouterr().err
    try:
        assert prompt_tokens() == plain + 4, "an empty thought"
        assert prompt_tokens(reasoning_effort="high") == plain
        assert prompt_tokens(chat_template_kwargs={"enable_thinking": True}) == plain
    finally:
        ask_to_think(engine, "auto", print)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "suppress_tokens", "bad_words_ids", "prompt"])
def test_ids_beyond_the_embedding_are_refused_by_name_and_padded_ones_are_not(qwen: Served, field: str) -> None:
    rows = ROWS["qwen3"]
    assert qwen.worker.engine.vocabulary == rows > len(qwen.worker.engine.tokenizer)
    for token, status in ((rows - 1, 200), (rows, 400)):
        ids: dict[str, Any] = {"logit_bias": {str(token): -1}, "bad_words_ids": [[token]], "prompt": [785, token]}
        value = ids.get(field, [token])
        body = {"prompt": [785], "max_tokens": 1, field: value}
        with qwen.http as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == status, answer.text
        assert status == 200 or answer.json()["error"]["param"] == field


def test_wishes_of_vllms_clients_reach_the_sampler(qwen: Served) -> None:
    (ending,) = qwen.worker.engine.encoding.encode_rest("<|im_end|>")
    (look,) = qwen.worker.engine.encoding.encode_rest(" look")
    cut = ask(qwen, stop_token_ids=[look]).json()["choices"][0]
    assert (cut["finish_reason"], cut["message"]["reasoning_content"]) == ("stop", "I must")
    long = ask(qwen, min_tokens=70, max_tokens=70).json()
    assert (long["usage"]["completion_tokens"], long["choices"][0]["finish_reason"]) == (70, "length")
    assert ask(qwen, logit_bias={str(ending): 100}, max_tokens=3).json()["usage"]["completion_tokens"] == 1


def test_a_short_request_is_answered_while_a_huge_one_is_still_being_read(qwen: Served) -> None:
    properties = {f"property_{number}": {"type": "string"} for number in range(3000)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    huge: list[Any] = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 20_000}]
    ended: dict[str, float] = {}

    def timed(name: str, messages: list[Any], **more: object) -> Any:
        answer = ask(qwen, messages, max_tokens=1, **more)
        ended[name] = time.monotonic()
        return answer

    with ThreadPoolExecutor() as pool:
        long = pool.submit(timed, "long", huge, tools=[tool])
        time.sleep(0.2)
        assert timed("short", QUESTION).status_code == 200
        assert long.result().json()["error"]["code"] == "context_length_exceeded"
    assert ended["short"] < ended["long"]
