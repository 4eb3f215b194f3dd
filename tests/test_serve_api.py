"""What OpenAI's clients rely on: shapes, streams, refusals. Every test talks HTTP to a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from specexec.sampling.params import derived_seed
from tests.serving import LetterEngine, Served, serving
from tests.waiting import until

F = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(LetterEngine) as served:
        yield served


def events(response: httpx.Response) -> list[dict[str, object]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_official_client_gets_a_chat_completion(server: Served) -> None:
    with server.openai() as client:
        done = client.chat.completions.create(model="letters", messages=[{"role": "user", "content": "echo me"}])
    choice = done.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("echo me", "assistant", "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 7)
    details = done.usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (4, 0)


def test_a_stream_adds_up_to_the_whole(server: Served) -> None:
    with server.openai() as client:
        stream = client.chat.completions.create(
            model="letters",
            messages=[{"role": "user", "content": "naïve 漢字 👍"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "naïve 漢字 👍"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10


def test_a_stream_ends_with_done_and_counts_what_was_drafted(server: Served) -> None:
    response = server.ask("abcdefg", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    last = events(response)[-1]
    timings = last["timings"]
    assert isinstance(timings, dict)
    assert [timings[name] for name in ("draft_n", "draft_n_accepted", "draft_n_verif_steps")] == [4, 4, 3]


def test_raw_completions_take_text_lists_and_token_ids(server: Served) -> None:
    with server.openai() as client:
        one = client.completions.create(model="letters", prompt="abc", echo=True)
        ids = client.completions.create(model="letters", prompt=[97, 98, 99], max_tokens=2)
        many = client.completions.create(model="letters", prompt=["ab", "cd"], n=2)
        chunks = list(client.completions.create(model="letters", prompt="abcd", stream=True))
    assert one.choices[0].text == "abcabc"
    assert (ids.choices[0].text, ids.choices[0].finish_reason) == ("ab", "length")
    assert [(choice.index, choice.text) for choice in many.choices] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    assert many.usage is not None
    assert many.usage.prompt_tokens == 4
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"


def test_completions_default_to_sixteen_tokens_and_chats_to_the_context(server: Served) -> None:
    with server.openai() as client:
        assert client.completions.create(model="letters", prompt="x" * 40).choices[0].text == "x" * 16
    assert server.ask("x" * 40).json()["choices"][0]["message"]["content"] == "x" * 40


def test_the_first_choice_has_the_seed_asked_for_and_the_others_derived_ones(server: Served) -> None:
    seeds = [choice["seed"] for choice in server.ask("ab", n=3, seed=7).json()["choices"]]
    assert seeds == [7, derived_seed(7, "choice", 1) % 2**53, derived_seed(7, "choice", 2) % 2**53]


def test_sampling_reaches_the_engine(server: Served) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "presence_penalty": 1,
        "stop": "##",
        "max_completion_tokens": 3,
    }
    assert server.ask("abcdef", **asked).json()["choices"][0]["message"]["content"] == "abc"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"70000": 1}}, "logit_bias", "invalid_token"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
        ({"guided_regex": "a+", "tools": [F]}, "guided_regex", "invalid_value"),
        ({"tools": [F]}, "tools", "unsupported_parameter"),
        ({"tools": [F, F]}, "tools", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice",
         "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]}, "messages.0.function_call",
         "unsupported_parameter"),
        ({"guided_regex": "a+", "response_format": {"type": "json_object"}}, "guided_regex", "invalid_value"),
        ({"guided_json": "[1]"}, "guided_json", "invalid_value"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs", "bad_grammar"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", "bad_grammar"),
        ({"grammar": 'root ::= "x"', "guided_regex": "x"}, "grammar", "invalid_value"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content",
         "unsupported_content"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(server: Served, more: dict[str, object], param: str, code: str) -> None:
    response = server.ask("x", **more)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_parameters_that_ask_for_nothing_are_fine(server: Served) -> None:
    nothing = {"logit_bias": {}, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "user": "me"}
    assert server.ask("x", **nothing).status_code == 200


def test_an_unknown_parameter_is_not_ignored_in_silence(server: Served) -> None:
    assert server.ask("x", surprise=1).status_code == 200
    until(lambda: any("ignored 'surprise'" in line for line in server.log))


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(server: Served) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model="letters", messages=[{"role": "user", "content": "x" * 900}], max_tokens=101
        )
    assert refusal.value.code == "context_length_exceeded"
    assert "1000" in refusal.value.message
    assert "1001" in refusal.value.message


def test_an_empty_prompt_is_refused(server: Served) -> None:
    assert server.ask("").json()["error"]["code"] == "empty_prompt"


def test_an_unknown_model_is_answered_with_the_known_ones(server: Served) -> None:
    with server.openai() as client:
        with pytest.raises(openai.NotFoundError) as refusal:
            client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])
        assert (refusal.value.code, "letters" in refusal.value.message) == ("model_not_found", True)
        assert [model.id for model in client.models.list()] == ["letters"]
        assert client.models.retrieve("letters").owned_by == "specexec"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("a/b")


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b'"x"', 400), (b'{"messages": NaN}', 400), (b'{"model": "\\ud83d"}', 400),
     (b"\xff\xfe", 400),
     (b'{"temperature": 1e999}', 400), (b'{"seed": ' + b"9" * 5000 + b"}", 400),
     (b'{"tools": ' + b'{"a": ' * 500 + b"1" + b"}" * 501, 400), (b'{"prompt": "\xff"}', 400), (b"{}{}", 400),
     (b"[" * 100_000, 400), (b'{"messages": "' + b"x" * (8 * 1024 * 1024) + b'"}', 413)],
)  # fmt: skip
def test_a_malformed_body_is_the_clients_fault(server: Served, body: bytes, status: int) -> None:
    with server.http as client:
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_seed_that_is_too_large_is_refused_with_its_true_bound(server: Served) -> None:
    refused = server.ask("ab", seed=2**64)
    assert refused.status_code == 400
    assert "18446744073709551615" in refused.json()["error"]["message"]
    assert server.ask("ab", seed=2**64 - 1).status_code == 200


def test_a_form_cannot_be_mistaken_for_a_request(server: Served) -> None:
    with server.http as client:
        assert client.post("/v1/chat/completions", data={"messages": "x"}).status_code == 415
        typed = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
        untyped = client.post("/v1/chat/completions", content=b"{}", headers={"origin": "https://evil.example"})
    assert (typed.status_code, untyped.status_code) == (415, 403)


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(server: Served) -> None:
    with server.http as client:
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert client.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_text_becomes_tokens_and_tokens_text(server: Served) -> None:
    with server.http as client:
        made = client.post("/tokenize", json={"content": "ab"}).json()
        assert made == {"tokens": [97, 98], "count": 2, "max_model_len": 1000}
        assert client.post("/v1/detokenize", json={"tokens": made["tokens"]}).json()["content"] == "ab"
        assert client.post("/tokenize", json={"messages": [{"role": "user", "content": "c"}]}).json()["tokens"] == [99]
        for wrong in ({}, {"content": 5}, {"content": "a", "prompt": "b"}):
            assert client.post("/tokenize", json=wrong).status_code == 400
        for ids in ([-1], ["a"], "a", [True], [10**9]):
            assert client.post("/detokenize", json={"tokens": ids}).status_code == 400


def test_metrics_are_prometheus_text(server: Served) -> None:
    server.ask("abc")
    with server.http as client:
        response = client.get("/metrics")
    values = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert float(values["specexec_generated_tokens_total"]) >= 3
    assert values["specexec_ready"] == "1"


def test_health_tells_loading_from_ready_and_nothing_is_answered_before() -> None:
    go = threading.Event()

    def slow() -> LetterEngine:
        go.wait(60)
        return LetterEngine()

    with serving(slow, wait=False) as server, server.http as client:
        loading = client.get("/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        server.worker.layers_are_read(2, 5)
        progress = client.get("/health").json()
        assert (progress["layers_read"], progress["layers_to_read"]) == (2, 5)
        refused = server.ask("x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert int(refused.headers["retry-after"]) > 0
        go.set()
        until(lambda: server.worker.state == "ok")
        assert client.get("/health").json()["status"] == "ok"


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    with server.http as client:
        page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
