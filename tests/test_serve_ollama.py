"""Ollama's API and llama.cpp's, as their clients use them."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import httpx
import ollama
import pytest

from tests.agent import EMPTY, MISSING, PARAMETERS, TASK, THOUGHT
from tests.serving import LetterEngine, Served, serving

TOOL: Any = {"type": "function", "function": {"name": "read_file", "parameters": PARAMETERS}}
COLD = {"temperature": 0}


def client(server: Served) -> ollama.Client:
    return ollama.Client(host=server.url, trust_env=False)


def raw(server: Served, path: str, **body: object) -> httpx.Response:
    with server.http as http:
        return http.post(path, json=body)


def test_its_client_chats_and_generates_whole_and_streamed(letters: Served) -> None:
    talk = [{"role": "user", "content": "echo me"}]
    with client(letters) as api:
        whole = api.chat("letters:latest", talk, keep_alive="5m")
        parts = list(api.chat("letters", talk, stream=True))
        made = api.generate("letters", "abcdef", system="s", options={"num_predict": 3, "num_thread": 4})
        plain = list(api.generate("letters", "x" * 40, raw=True, stream=True))
    assert (whole.message.content, whole.done, whole.done_reason, whole.eval_count) == ("echo me", True, "stop", 7)
    assert "".join(part.message.content or "" for part in parts) == "echo me"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (made.response, made.done_reason, made.prompt_eval_count) == ("abc", "length", 6)
    assert "".join(part.response or "" for part in plain) == "x" * 40


def test_an_agent_talks_over_several_turns(agent: Served) -> None:
    talk: list[Any] = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": TASK}]
    answers: list[Any] = []
    with client(agent) as api:
        for results in ([EMPTY], ["yes", MISSING], []):
            whole = api.chat("agent", talk, tools=[TOOL], options=COLD, think=True)
            parts = list(api.chat("agent", talk, tools=[TOOL], options=COLD, think=True, stream=True))
            assert "".join(part.message.content or "" for part in parts) == whole.message.content
            assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
            calls = [call for part in parts for call in part.message.tool_calls or []]
            assert calls == [*(whole.message.tool_calls or [])]
            answers.append(whole.message)
            talk += [whole.message]
            talk += [{"role": "tool", "tool_name": "read_file", "content": text} for text in results]
    called = [[call.function.arguments["path"] for call in answer.tool_calls or []] for answer in answers]
    assert called == [["a.txt"], ["a.txt", "b.txt"], []]
    assert (answers[0].thinking, answers[0].content) == (THOUGHT, "Let me look.")
    assert answers[-1].content == "There was no bug at all."


def test_the_prompt_is_that_of_the_same_chat(agent: Served) -> None:
    """Results go to the calls of their tool, in their order, though neither has an id."""
    calls = [{"function": {"name": name, "arguments": {"path": name}}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "tool_name": name, "content": name} for name in ("g", "f", "f")]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", "thinking": "Hm.",
             "tool_calls": calls}, *results]  # fmt: skip
    told = raw(agent, "/api/chat", messages=talk, stream=False, options={"num_predict": 1}).json()
    chat = [
        talk[0],
        {
            "role": "assistant", "content": "ok", "reasoning_content": "Hm.",
            "tool_calls": [{"id": str(at), "type": "function", **call} for at, call in enumerate(calls)],
        },
        *({"role": "tool", "tool_call_id": name, "content": text} for name, text in ("1g", "0f", "2f")),
    ]  # fmt: skip
    same = agent.ask("", messages=chat, max_tokens=1).json()
    assert told["prompt_eval_count"] == same["usage"]["prompt_tokens"]


def test_a_format_binds_the_answer_and_thinking_can_be_turned_off(agent: Served) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    with client(agent) as api:
        bound = api.generate("agent", "Is it?", format=schema, options=COLD, think=False)
        scored = api.chat("agent", [{"role": "user", "content": MISSING}], options=COLD, logprobs=True, top_logprobs=2)
    assert set(json.loads(bound.response or "")) == {"ok"}
    assert scored.logprobs is not None
    assert len(scored.logprobs) == scored.eval_count
    assert len(scored.logprobs[0].top_logprobs or []) == 2


def test_it_says_what_is_here(letters: Served, agent: Served) -> None:
    with client(letters) as api:
        assert [model.model for model in api.list().models] == ["letters"]
        shown = api.show("letters:latest")
        with pytest.raises(ollama.ResponseError, match="letters") as refusal:
            api.show("llama")
        assert refusal.value.status_code == 404
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["letters.context_length"] == 1000
    with client(agent) as api:
        assert api.show("agent").capabilities == ["completion", "tools", "thinking"]
    with letters.http as http:
        assert http.get("/api/version").json() == {"version": version("specexec")}


@pytest.mark.parametrize(
    ("path", "more", "status", "named"),
    [
        ("/api/chat", {}, 400, "messages"),
        ("/api/chat", {"model": "llama", "messages": [{"role": "user", "content": "x"}]}, 404, "letters"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "messages.0.content"),
        ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages.0.tool_calls.0"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "format": "yaml"}, 400, "format"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/api/generate", {"prompt": "x", "context": [1]}, 400, "context"),
        ("/api/generate", {"prompt": "x", "options": {"temperature": -1}}, 400, "temperature"),
        ("/api/nothing", {}, 404, "/api/nothing"),
    ],
)  # fmt: skip
def test_refusals_come_in_its_shape(letters: Served, path: str, more: dict[str, Any], status: int, named: str) -> None:
    answer = raw(letters, path, **more)
    assert answer.status_code == status
    assert named in answer.json()["error"]


def test_a_stream_that_fails_ends_with_the_error_and_a_silent_one_is_kept_alive() -> None:
    engine = LetterEngine(sweep_s=0.5)
    with serving(lambda: engine, keepalive_s=0.1) as server:
        alive = raw(server, "/api/generate", prompt="abc").text.splitlines()
        engine.broken = True
        with client(server) as api, pytest.raises(ollama.ResponseError, match="cannot be read"):
            list(api.generate("letters", "abc", stream=True))
    assert len(alive) >= 4
    assert all(json.loads(line)["model"] == "letters" for line in alive)


def test_llama_cpps_clients_learn_the_context_and_see_the_prompt(agent: Served) -> None:
    talk = [{"role": "user", "content": "hi"}]
    with agent.http as http:
        props = http.get("/props").json()
        card = http.get("/v1/models").json()["data"][0]
        slots = http.get("/slots").json()
    engine = agent.worker.engine
    assert [(slot["id"], slot["is_processing"]) for slot in slots] == [(at, False) for at in range(4)]
    assert props["default_generation_settings"]["n_ctx"] == card["max_model_len"] == engine.context
    assert props["chat_template"] == engine.encoding.template
    assert raw(agent, "/apply-template", messages=talk).json() == {"prompt": engine.encoding.render(talk)}


def test_every_answer_names_its_request(letters: Served) -> None:
    with letters.http as http:
        made = http.get("/health").headers
        given = http.get("/v1/nothing", headers={"x-request-id": "my-own.1"}).headers
        odd = http.get("/health", headers={"x-request-id": "a b"}).headers
    assert made["x-request-id"] == made["request-id"] != odd["x-request-id"]
    assert (given["x-request-id"], given["request-id"]) == ("my-own.1", "my-own.1")
    assert odd["x-request-id"].startswith("req_")


def test_the_cached_part_of_a_prompt_is_said(agent: Served) -> None:
    """Once for a prompt, however many choices were asked for; all but the last token can be known."""
    usages = [agent.ask("A prompt of its own.", n=2, max_tokens=1).json()["usage"] for _ in range(2)]
    first, second = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert first < second == usages[1]["prompt_tokens"] - 1
