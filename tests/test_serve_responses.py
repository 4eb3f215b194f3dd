"""OpenAI's Responses: what its own client needs, events as its types have them, conversations that are stored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from cli.openai.errors import ApiError
from cli.responses_api.store import ResponseStore, StoredResponse
from tests.agent import EMPTY, MISSING, PARAMETERS, TASK, THOUGHT
from tests.serving import LetterEngine, Served, serving

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL: Any = {"type": "function", "name": "read_file", "parameters": PARAMETERS, "strict": True}


class Verdict(BaseModel):
    """What an answer is parsed into."""

    ok: bool


def raw(server: Served, path: str = "/v1/responses", **body: object) -> httpx.Response:
    with server.http as http:
        return http.post(path, json={"input": "abc", **body})


def events(answer: httpx.Response) -> list[Any]:
    lines = answer.text.splitlines()
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [e["type"] for e in told]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def test_the_official_client_gets_a_response(letters: Served) -> None:
    with letters.openai() as client:
        told = client.responses.create(model="letters", input="echo me", metadata={"a": "b"})
        cut = client.responses.create(model="letters", input="abcdef", max_output_tokens=3)
    assert (told.output_text, told.status, told.metadata) == ("echo me", "completed", {"a": "b"})
    assert told.usage is not None
    assert (told.usage.input_tokens, told.usage.output_tokens, told.usage.total_tokens) == (7, 7, 14)
    assert (cut.output_text, cut.status) == ("abc", "incomplete")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    Response.model_validate(told.model_dump(by_alias=True), strict=False)


def test_every_event_of_a_stream_is_of_the_clients_own_types(agent: Served) -> None:
    told = events(raw(agent, input=TASK, tools=[TOOL], temperature=0, stream=True))
    for event in told:
        EVENT.validate_python(event)
    items = [event["item"]["type"] for event in told if event["type"] == "response.output_item.added"]
    assert items == ["reasoning", "message", "function_call"]
    assert (told[0]["type"], told[-1]["type"]) == ("response.created", "response.completed")
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert told[-1]["response"]["output"] == done
    for kind in ("reasoning_text", "output_text", "function_call_arguments"):
        deltas = "".join(event["delta"] for event in told if event["type"] == f"response.{kind}.delta")
        (end,) = [event for event in told if event["type"] == f"response.{kind}.done"]
        assert deltas == end["arguments" if kind.startswith("function") else "text"] != ""


def test_thoughts_are_their_own_summary_for_a_client_that_reads_summaries_alone(agent: Served) -> None:
    told = events(raw(agent, input=TASK, reasoning={"summary": "auto"}, tools=[TOOL], temperature=0, stream=True))
    for event in told:
        EVENT.validate_python(event)
    deltas = [event["delta"] for event in told if event["type"] == "response.reasoning_summary_text.delta"]
    item = told[-1]["response"]["output"][0]
    assert ("".join(deltas), item["summary"], item["content"]) == (
        THOUGHT, [{"type": "summary_text", "text": THOUGHT}], []
    )  # fmt: skip
    again = raw(agent, "/v1/responses/input_tokens", input=[{"role": "user", "content": TASK}, item])
    spelled = {**item, "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]}
    same = raw(agent, "/v1/responses/input_tokens", input=[{"role": "user", "content": TASK}, spelled])
    assert again.json()["input_tokens"] == same.json()["input_tokens"]


@pytest.mark.parametrize("stored", [True, False])
def test_an_agent_talks_over_several_turns(agent: Served, stored: bool) -> None:
    """With stored responses only the results go out, without them the whole conversation: the answers are the same."""
    asked: dict[str, Any] = {"model": "agent", "tools": [TOOL], "temperature": 0, "store": stored,
                             "instructions": "You are an agent.", "reasoning": {"effort": "high"}}  # fmt: skip
    talk: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": TASK}]}]
    new, before = talk, None
    answers: list[Response] = []
    with agent.openai() as client:
        for results in ([EMPTY], ["yes", MISSING], []):
            with client.responses.stream(input=new, previous_response_id=before, **asked) as stream:
                streamed = stream.get_final_response()
            whole = client.responses.create(input=new, previous_response_id=before, **asked)
            assert items_of(streamed) == items_of(whole)
            assert whole.usage is not None
            assert whole.usage.input_tokens_details.cached_tokens, "the stream has just read the same prompt"
            counted = client.responses.input_tokens.count(
                model="agent", input=new, previous_response_id=before, tools=[TOOL],
                instructions="You are an agent.", reasoning={"effort": "high"},
            )  # fmt: skip
            assert counted.input_tokens == whole.usage.input_tokens
            answers.append(whole)
            calls = [item for item in whole.output if item.type == "function_call"]
            outputs = [
                {"type": "function_call_output", "call_id": call.call_id, "output": text}
                for call, text in zip(calls, results, strict=True)
            ]
            talk = [*talk, *(item.to_dict() for item in whole.output), *outputs]
            new, before = (outputs, whole.id) if stored else (talk, None)
    kinds = [[item.type for item in answer.output] for answer in answers]
    assert kinds == [
        ["reasoning", "message", "function_call"],
        ["reasoning", "function_call", "function_call"],
        ["reasoning", "message"],
    ]
    assert answers[-1].output_text == "There was no bug at all."
    thought = answers[0].output[0]
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert [part.text for part in thought.content] == [THOUGHT]
    usages = [answer.usage for answer in answers]
    assert all(usage is not None and usage.output_tokens_details.reasoning_tokens for usage in usages)


def items_of(response: Any) -> list[dict[str, Any]]:
    """What a response holds, without the ids that are new each time."""
    fields = {"type", "content", "arguments", "name", "role", "status"}
    return [
        {key: [part["text"] for part in value] if key == "content" else value for key, value in item.items()}
        for item in (item.model_dump(include=fields) for item in response.output)
    ]


def test_the_prompt_is_that_of_the_same_chat(agent: Served) -> None:
    """Items reach the template as OpenAI's messages do; what an assistant thought, said and called is one message."""
    call = {"type": "function_call", "call_id": "c1", "name": "read_file", "arguments": '{"path": "a"}'}
    items: list[Any] = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "gone"}]},
        {"role": "user", "content": "and now"},
    ]
    function = {"name": "read_file", "arguments": '{"path": "a"}'}
    said = {"role": "assistant", "content": "ok", "reasoning_content": "Hm."}
    chat: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {**said, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "gone"},
        {"role": "user", "content": "and now"},
    ]
    tools = [{"type": "function", "function": {"name": "read_file", "parameters": PARAMETERS, "strict": True}}]
    counted = raw(agent, "/v1/responses/input_tokens", input=items, instructions="Be brief.", tools=[TOOL])
    same = agent.ask("", messages=chat, tools=tools, max_tokens=1)
    assert counted.json()["input_tokens"] == same.json()["usage"]["prompt_tokens"]


def test_an_answer_is_parsed_into_the_clients_own_model(agent: Served) -> None:
    with agent.openai() as client:
        told = client.responses.parse(model="agent", input="Is it?", text_format=Verdict, temperature=0)
    assert isinstance(told.output_parsed, Verdict)


def test_a_stored_response_can_be_read_referred_to_and_forgotten(letters: Served) -> None:
    with letters.openai() as client:
        first = client.responses.create(model="letters", input="abc")
        again = client.responses.retrieve(first.id)
        assert (again.id, again.output_text) == (first.id, "abc")
        reference: Any = {"type": "item_reference", "id": first.output[0].id}
        user: Any = {"role": "user", "content": "xyz"}
        assert client.responses.create(model="letters", input=[reference, user]).output_text == "xyz"
        client.responses.delete(first.id)
        unstored = client.responses.create(model="letters", input="abc", store=False)
        for name in (first.id, unstored.id):
            with pytest.raises(openai.NotFoundError, match="stored"):
                client.responses.retrieve(name)
            with pytest.raises(openai.NotFoundError, match="stored") as refusal:
                client.responses.create(model="letters", input="x", previous_response_id=name)
            assert refusal.value.param == "previous_response_id"


def test_the_store_forgets_the_oldest_and_what_is_too_large() -> None:
    def response(name: str, text: str = "") -> StoredResponse:
        return StoredResponse({"id": name, "output": [{"id": f"of {name}", "text": text}]}, [])

    store = ResponseStore(most=2, letters=500)
    for name in "abc":
        store.put(response(name))
    assert store.item("of c") == {"id": "of c", "text": ""}
    assert store.item("of a") is None
    store.get("b")
    store.put(response("d"))
    with pytest.raises(ApiError):
        store.get("c")
    store.put(response("e", "x" * 1000))
    for name in "bde":
        with pytest.raises(ApiError):
            store.get(name)


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"include": ["message.output_text.logprobs"]}, "include", "unsupported_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "invalid_value"),
        ({"input": [{"type": "computer_call"}]}, "input.0", "unsupported_content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0",
         "unsupported_content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "invalid_value"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(letters: Served, more: dict[str, Any], param: str, code: str) -> None:
    answer = raw(letters, **more)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


def test_what_is_left_out_is_said(letters: Served) -> None:
    answer = raw(letters, surprise=1, truncation="auto", tools=[{"type": "web_search"}], include=["x"])
    assert answer.status_code == 200
    assert all(name in answer.headers["x-specexec-notes"] for name in ("surprise", "truncation", "web_search"))


def test_a_sweep_that_fails_fails_the_response() -> None:
    engine = LetterEngine()
    with serving(lambda: engine) as server:
        engine.broken = True
        told = events(raw(server, stream=True))
    assert (told[-1]["type"], told[-1]["response"]["status"]) == ("response.failed", "failed")
    assert told[-1]["response"]["error"]["code"] == "server_error"
    EVENT.validate_python(told[-1])
