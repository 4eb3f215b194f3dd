"""Anthropic's Messages: what its own client needs, events as its types have them, a coding agent's conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import TypeAdapter

from tests.agent import EMPTY, MISSING, PARAMETERS, TASK, THOUGHT
from tests.serving import LetterEngine, Served, serving
from tests.waiting import until

if TYPE_CHECKING:
    from anthropic import Anthropic
    from anthropic.types import Message

TOOL: dict[str, Any] = {
    "name": "read_file",
    "description": "What a file holds.",
    "input_schema": PARAMETERS,
    "cache_control": {"type": "ephemeral"},
}


@pytest.fixture(scope="module")
def letters() -> Iterator[Served]:
    with serving(LetterEngine, names=("letters", "claude-letters")) as served:
        yield served


def client(server: Served, key: str = "none") -> Anthropic:
    from anthropic import Anthropic  # six seconds, and these tests alone need it

    return Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=120)


GREEDY = {"temperature": 0}  # the client has no argument for it (2.14)


def raw(server: Served, path: str = "/v1/messages", **body: object) -> httpx.Response:
    with server.http as http:
        return http.post(path, json={"max_tokens": 100, "messages": [{"role": "user", "content": "abc"}], **body})


def events(answer: httpx.Response) -> list[tuple[str, Any]]:
    lines = answer.text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    return list(zip(names, [json.loads(line[6:]) for line in lines if line.startswith("data: ")], strict=True))


def test_the_official_client_gets_a_message(letters: Served) -> None:
    with client(letters) as api:
        told = api.messages.create(
            model="claude-letters", max_tokens=100, messages=[{"role": "user", "content": "echo me"}]
        )
    assert [block.type for block in told.content] == ["text"]
    assert told.content[0].type == "text"
    assert (told.content[0].text, told.stop_reason, told.model) == ("echo me", "end_turn", "claude-letters")
    assert (told.usage.input_tokens, told.usage.output_tokens) == (7, 7)


def test_a_short_answer_says_what_cut_it(letters: Served) -> None:
    with client(letters) as api:
        cut = api.messages.create(model="letters", max_tokens=3, messages=[{"role": "user", "content": "abcdef"}])
        full = api.messages.create(model="letters", max_tokens=9999, messages=[{"role": "user", "content": "x" * 600}])
    assert (cut.stop_reason, full.stop_reason) == ("max_tokens", "model_context_window_exceeded")
    assert full.usage.output_tokens == 400


def test_every_event_of_a_stream_is_of_the_clients_own_types(agent: Served) -> None:
    from anthropic.types import RawMessageStreamEvent

    answer = raw(agent, messages=[{"role": "user", "content": TASK}], tools=[TOOL], temperature=0, stream=True)
    told = events(answer)
    assert all(name == data["type"] for name, data in told)
    event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    kinds = [type(event.validate_python(data)).__name__ for name, data in told if name != "ping"]
    assert kinds[0] == "RawMessageStartEvent"
    assert kinds[-2:] == ["RawMessageDeltaEvent", "RawMessageStopEvent"]
    blocks = [data["content_block"]["type"] for name, data in told if name == "content_block_start"]
    deltas = {data["delta"]["type"] for name, data in told if name == "content_block_delta"}
    assert blocks == ["thinking", "text", "tool_use"]
    assert deltas == {"thinking_delta", "signature_delta", "text_delta", "input_json_delta"}
    assert [data["index"] for name, data in told if name == "content_block_stop"] == [0, 1, 2]


def test_an_agent_talks_over_several_turns_and_a_stream_adds_up_to_the_whole(agent: Served) -> None:
    """Text, a call, its result, two calls at once, a failure, an end; what was said goes back as it came."""
    talk: list[Any] = [{"role": "user", "content": [{"type": "text", "text": TASK}]}]
    asked: dict[str, Any] = {
        "model": "agent",
        "max_tokens": 200,
        "extra_body": GREEDY,
        "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
        "tools": [TOOL],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "me"},
    }
    answers: list[Message] = []
    with client(agent) as api:
        for results in ([EMPTY], ["yes", MISSING], []):
            with api.messages.stream(messages=talk, **asked) as stream:
                streamed = stream.get_final_message()
            whole = api.messages.create(messages=talk, **asked)
            assert blocks_of(streamed) == blocks_of(whole)
            assert (streamed.stop_reason, streamed.usage.output_tokens) == (
                whole.stop_reason,
                whole.usage.output_tokens,
            )
            counted = api.messages.count_tokens(
                messages=talk, **{name: asked[name] for name in ("model", "system", "tools", "thinking")}
            )
            assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
            assert whole.usage.cache_read_input_tokens, "the stream has just read the same prompt"
            answers.append(streamed)
            calls = [block for block in streamed.content if block.type == "tool_use"]
            talk += [{"role": "assistant", "content": streamed.content}]
            if results:
                talk += [{"role": "user", "content": [result(*pair) for pair in zip(calls, results, strict=True)]}]
    kinds = [[block.type for block in answer.content] for answer in answers]
    assert kinds == [["thinking", "text", "tool_use"], ["thinking", "tool_use", "tool_use"], ["thinking", "text"]]
    assert [answer.stop_reason for answer in answers] == ["tool_use", "tool_use", "end_turn"]
    assert answers[0].content[0].type == "thinking"
    assert answers[0].content[0].thinking == THOUGHT
    assert answers[1].content[2].type == "tool_use"
    assert answers[1].content[2].input == {"path": "b.txt"}


def blocks_of(message: Message) -> list[dict[str, Any]]:
    """What a message holds, without the ids that are new each time."""
    return [block.model_dump(exclude={"id"}) for block in message.content]


def result(call: Any, text: str) -> dict[str, Any]:
    content = text if text == "yes" else [{"type": "text", "text": text}]
    return {"type": "tool_result", "tool_use_id": call.id, "content": content, "is_error": "missing" in text}


def test_a_coding_agents_twenty_requests_replay_with_turns_given_up_in_between(agent: Served) -> None:
    """As agents send them: all that was said each time, thoughts and calls and results as they came, streamed."""
    rounds: list[tuple[list[str], list[str]]] = [  # what a request brings, and the blocks of its answer
        ([TASK], ["thinking", "text", "tool_use"]),
        ([EMPTY], ["thinking", "tool_use", "tool_use"]),
        (["yes", MISSING], ["thinking", "text"]),
    ]
    asked: dict[str, Any] = {
        "model": "agent", "max_tokens": 200, "extra_body": GREEDY, "tools": [TOOL], "metadata": {"user_id": "me"},
        "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    talk: list[Any] = []
    calls: list[Any] = []
    with client(agent) as api:
        for number in range(20):
            brought, kinds = rounds[number % 3]
            content: Any = [result(*pair) for pair in zip(calls, brought, strict=True)] if number % 3 else brought[0]
            talk.append({"role": "user", "content": content})
            if number in (2, 7, 12, 19):
                with api.messages.create(messages=talk, **asked, stream=True) as stream:
                    next(iter(stream))
                until(lambda: not agent.worker.running)
            with api.messages.stream(messages=talk, **asked) as stream:
                answer = stream.get_final_message()
            assert [block.type for block in answer.content] == kinds, number
            assert number == 0 or answer.usage.cache_read_input_tokens, "only what is new was read"
            calls = [block for block in answer.content if block.type == "tool_use"]
            assert answer.stop_reason == ("tool_use" if calls else "end_turn")
            talk.append({"role": "assistant", "content": answer.content})


def test_the_prompt_is_that_of_the_same_chat(agent: Served) -> None:
    """Blocks, results and calls reach the template as OpenAI's messages do, is_error as a word before the text."""
    call = {"type": "tool_use", "id": "t1", "name": "read_file", "input": {"path": "a"}}
    failed = {"type": "tool_result", "tool_use_id": "t1", "content": "gone", "is_error": True}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    blocks: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "ok"}, call]},
        {"role": "user", "content": [failed, {"type": "text", "text": "and"}, {"type": "text", "text": " now"}]},
    ]
    function = {"name": "read_file", "arguments": {"path": "a"}}
    chat: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant", "content": "ok", "reasoning_content": "Hm.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: gone"},
        {"role": "user", "content": "and now"},
    ]  # fmt: skip
    tool = {"type": "function", "function": {"name": "read_file", "description": TOOL["description"],
                                             "parameters": TOOL["input_schema"]}}  # fmt: skip
    counted = raw(agent, "/v1/messages/count_tokens", messages=blocks, system="Be brief.", tools=[TOOL])
    same = agent.ask("", messages=chat, tools=[tool], max_tokens=1)
    assert counted.json()["input_tokens"] == same.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [({"type": "any", "disable_parallel_tool_use": True}, "tool_use"), ({"type": "none"}, "end_turn"),
     ({"type": "tool", "name": "read_file"}, "tool_use")],
)  # fmt: skip
def test_a_choice_of_tools_is_followed(agent: Served, choice: object, reason: str) -> None:
    asked = [{"role": "user", "content": EMPTY}]
    answer = raw(agent, messages=asked, tools=[TOOL], tool_choice=choice, temperature=0).json()
    assert answer["stop_reason"] == reason
    if choice == {"type": "any", "disable_parallel_tool_use": True}:
        assert [block["type"] for block in answer["content"]] == ["thinking", "tool_use"]


def test_a_stop_sequence_is_named_and_an_answer_can_be_begun(agent: Served) -> None:
    asked: list[Any] = [{"role": "user", "content": MISSING}]
    stopped = raw(agent, messages=asked, stop_sequences=["no bug", "xyz"], temperature=0).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "no bug")
    assert stopped["content"][-1]["text"] == "There was "
    begun = [*asked, {"role": "assistant", "content": "There was no"}]
    assert raw(agent, messages=begun, max_tokens=1).status_code == 200


def test_a_schema_binds_the_answer_and_thinking_can_be_turned_off(agent: Served) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    shape = {"format": {"type": "json_schema", "schema": schema}}
    answer = raw(agent, output_config=shape, thinking={"type": "disabled"}, temperature=0).json()
    assert set(json.loads(answer["content"][-1]["text"])) == {"ok"}


@pytest.mark.parametrize(
    ("more", "status", "kind", "named"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "claude-opus"}, 404, "not_found_error", "letters"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error",
         "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, 400,
         "invalid_request_error", "messages.0.content.0.tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content":
            [{"type": "image"}]}]}]}, 400, "invalid_request_error", "messages.0.content.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}]}, 400,
         "invalid_request_error", "tool_result"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": ["x"]}]}]},
         400, "invalid_request_error", "messages.0.content.0.content.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "messages.0.role"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, 400, "invalid_request_error", "tool_choice"),
        ({"stop_sequences": ["a"] * 17}, 400, "invalid_request_error", "stop"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "invalid_request_error", "1000"),
    ],
)  # fmt: skip
def test_refusals_come_in_their_shape(
    letters: Served, more: dict[str, Any], status: int, kind: str, named: str
) -> None:
    answer = raw(letters, **more)
    assert answer.status_code == status
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)
    assert named in answer.json()["error"]["message"]


def test_the_client_raises_its_own_errors_also_for_a_key_and_in_a_stream() -> None:
    from anthropic import APIError, AuthenticationError, NotFoundError

    engine = LetterEngine()
    asked: dict[str, Any] = {"model": "letters", "max_tokens": 9, "messages": [{"role": "user", "content": "abc"}]}
    with serving(lambda: engine, key="secret") as server:
        with client(server, "wrong") as api, pytest.raises(AuthenticationError):
            api.messages.create(**asked)
        with client(server, "secret") as api:
            with pytest.raises(NotFoundError, match="letters"):
                api.messages.create(**{**asked, "model": "claude-opus"})
            assert api.messages.create(**asked).stop_reason == "end_turn"
            engine.broken = True
            with pytest.raises(APIError, match="cannot be read"), api.messages.stream(**asked) as stream:
                stream.get_final_message()


def test_what_is_left_out_is_said(letters: Served) -> None:
    answer = raw(letters, surprise=1, metadata={"user_id": "x"}, tools=[{"type": "web_search_20250305", "name": "w"}])
    assert answer.status_code == 200
    assert "surprise" in answer.headers["x-specexec-notes"]
    assert "web_search_20250305" in answer.headers["x-specexec-notes"]
    assert "metadata" not in answer.headers["x-specexec-notes"]


def test_a_silent_stream_is_kept_alive_by_pings() -> None:
    with serving(lambda: LetterEngine(sweep_s=0.5), keepalive_s=0.1) as server:
        told = events(raw(server, stream=True))
    assert [name for name, _ in told].count("ping") >= 3
