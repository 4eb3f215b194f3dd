"""What a client may ask of the words themselves: log-probabilities, biases, JSON, tools. The real demo answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import specexec
from specexec.engine.engine import Engine
from specexec.engine.request_types import Continuation
from specexec.sampling.params import SamplingParams
from tests.serving import Served, serving

QUESTION: list[Any] = [{"role": "user", "content": "What are you?"}]
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Rain or sun?", "parameters": SCHEMA},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
HERMES_TEMPLATE = """\
{%- if tools %}{{- '<|system|>To call: <tool_call> {"name": ..., "arguments": ...} </tool_call>. There are: ' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|end|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|assistant|>' }}{%- else %}{{- '<|user|>' + message.role + ':' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}
{{- '<|end|>' }}{%- endfor %}
{%- if mood is defined %}{{- mood }}{%- endif %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with specexec.load("demo", drafter="sibling", budget=16, dtype="f32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Served]:
    with serving(lambda: engine) as served:
        yield served


@pytest.fixture(scope="module")
def caller(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo with a template that knows tools, as Hermes and Qwen write them."""
    folder = tmp_path_factory.mktemp("caller") / "model"
    shutil.copytree(engine.folders["target"], folder)
    (folder / "chat_template.jinja").write_text(HERMES_TEMPLATE)
    with serving(lambda: specexec.load(str(folder), drafter="ngram", budget=8, dtype="f32")) as served:
        yield served


def test_a_json_schema_is_followed(server: Served) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    with server.openai() as client:
        done = client.chat.completions.create(model="letters", messages=QUESTION, response_format=shape, seed=1)
        stream = client.chat.completions.create(
            model="letters", messages=QUESTION, response_format=shape, seed=1, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    trip = json.loads(done.choices[0].message.content or "")
    assert trip["city"] in ("Oslo", "Lima")
    assert 1 <= trip["days"] <= 9
    assert (streamed, done.choices[0].finish_reason) == (done.choices[0].message.content, "stop")


def test_a_json_object_is_one(server: Served) -> None:
    text = server.ask("What are you?", response_format={"type": "json_object"}, seed=3, temperature=1, max_tokens=60)
    choice = text.json()["choices"][0]
    if choice["finish_reason"] == "stop":  # the toy may fill a string to the end
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


def test_n_choices_follow_the_same_schema_each_in_its_own_way(server: Served) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    answer = server.ask("Hello", response_format=shape, n=4, temperature=1.5, seed=1).json()
    trips = [json.loads(choice["message"]["content"]) for choice in answer["choices"]]
    assert all(set(trip) == {"city", "days"} for trip in trips)


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"type": "array", "uniqueItems": True}])
def test_a_schema_that_cannot_be_followed_is_refused(server: Served, schema: dict[str, object]) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused = server.ask("x", response_format=shape)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "bad_grammar", "response_format")


@pytest.mark.parametrize(
    "more",
    [{"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
     {"json_schema": SCHEMA}, {"response_format": {"type": "json_object", "schema": SCHEMA}}],
)  # fmt: skip
def test_a_schema_is_followed_wherever_a_client_puts_it(server: Served, more: dict[str, object]) -> None:
    trip = json.loads(server.ask("Hello", seed=2, **more).json()["choices"][0]["message"]["content"])
    assert set(trip) == {"city", "days"}


@pytest.mark.parametrize(
    "more",
    [{"guided_choice": ["yes.", "no (never)"]}, {"structured_outputs": {"choice": ["yes.", "no (never)"]}},
     {"guided_regex": r"yes\.|no \(never\)"}, {"structured_outputs": {"regex": r"yes\.|no \(never\)"}},
     {"grammar": 'root ::= "yes." | no\nno ::= "no (never)"'}, {"guided_grammar": 'start: "yes." | "no (never)"'},
     {"structured_outputs": {"grammar": 'root ::= ("yes." | "no (never)")'}}],
)  # fmt: skip
def test_an_answer_is_one_of_the_choices_or_matches_the_regex(server: Served, more: dict[str, object]) -> None:
    assert server.ask("Hello", seed=2, **more).json()["choices"][0]["message"]["content"] in ("yes.", "no (never)")
    with server.http as client:
        raw = client.post("/v1/completions", json={"prompt": "Say", "seed": 2, "max_tokens": 40, **more}).json()
    assert raw["choices"][0]["text"] in ("yes.", "no (never)")


HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "reasoning": "Hm.",
     "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", ["", None, "{", '"Oslo"', '{"city": "Oslo"}', {"city": "Oslo"}, "not JSON at all"]
)
def test_a_call_in_the_history_is_taken_whatever_its_arguments_are(caller: Served, arguments: object) -> None:
    history = json.loads(json.dumps(HISTORY))
    history[2]["tool_calls"][0]["function"]["arguments"] = arguments
    with caller.http as client:
        answer = client.post("/v1/chat/completions", json={"messages": history, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


def test_what_a_message_lacks_is_refused_with_its_place(caller: Served) -> None:
    for wrong, at in (({"role": "user"}, ".content"), ({"role": "user", "content": 5}, ".content"), ({}, ".role"),
                      ({"role": "assistant", "tool_calls": [{"function": {}}]}, ".tool_calls")):  # fmt: skip
        with caller.http as client:
            body = {"messages": [*QUESTION, wrong], "max_tokens": 1}
            refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"messages.1{at}"), refused.text


def test_a_bias_reaches_the_model(server: Served, engine: Engine) -> None:
    (loved,) = engine.encoding.encode_rest("Q")
    answer = server.ask("What are you?", logit_bias={str(loved): 100}, max_tokens=5, temperature=1)
    assert answer.json()["choices"][0]["message"]["content"] == "QQQQQ"


def test_chat_logprobs_are_the_models_own(server: Served, engine: Engine) -> None:
    with server.openai() as client:
        done = client.chat.completions.create(
            model="letters", messages=QUESTION, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0
        )
        chunks = list(client.chat.completions.create(
            model="letters", messages=QUESTION, logprobs=True, max_tokens=8, temperature=0, stream=True
        ))  # fmt: skip
    likely = done.choices[0].logprobs
    assert likely is not None
    assert likely.content is not None
    assert "".join(one.token for one in likely.content) == done.choices[0].message.content
    assert all(one.top_logprobs[0].token == one.token for one in likely.content)  # greedy
    assert likely.content[0].bytes == list(likely.content[0].token.encode())
    prompt = engine.encode(QUESTION)
    greedy = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=8))
    ((_, truth),) = engine.likelihoods([Continuation(prompt, greedy.tokens)])
    assert [one.logprob for one in likely.content] == pytest.approx(truth.log_probs, abs=1e-3)
    streamed = [
        one for chunk in chunks for one in ((chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or [])
    ]
    assert [one.logprob for one in streamed] == pytest.approx(truth.log_probs, abs=1e-3)


def test_a_harness_can_score_a_prompt_of_token_ids(server: Served, engine: Engine) -> None:
    """What lm-eval's local-completions sends: ids, echo, one token, logprobs of everything."""
    prompt = engine.encode("List the days of the week.")
    reused = server.worker.totals.prompt_tokens_reused_total
    with server.openai() as client:
        answers = [
            client.completions.create(
                model="letters", prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
            )
            for _ in range(2)  # the second finds the prompt in the cache, and must compute it all the same
        ]
    ((_, truth),) = engine.likelihoods([Continuation(prompt[:1], prompt[1:])])
    for answer in answers:
        likely = answer.choices[0].logprobs
        assert likely is not None
        assert likely.token_logprobs is not None
        assert likely.tokens is not None
        assert likely.text_offset is not None
        assert likely.top_logprobs is not None
        assert len(likely.tokens) == len(prompt) + 1
        assert likely.token_logprobs[0] is None
        assert likely.token_logprobs[1:-1] == pytest.approx(truth.log_probs, abs=1e-3)
        assert answer.choices[0].text == "".join(likely.tokens)
        for at, token in zip(likely.text_offset, likely.tokens, strict=True):
            assert answer.choices[0].text[at:].startswith(token)
        assert max(likely.top_logprobs[-1].values()) == likely.token_logprobs[-1]
    assert server.worker.totals.prompt_tokens_reused_total == reused


def test_a_remote_tokenizer_finds_all_it_asks_for(server: Served, engine: Engine) -> None:
    with server.http as client:
        known = client.get("/tokenizer_info").json()
        bare = client.post("/tokenize", json={"prompt": "days", "add_special_tokens": False}).json()["tokens"]
        assert (known["vocab_size"], known["eos_token"]) == (4096, "<|end|>")
        assert "message['role']" in known["chat_template"]
        assert client.post("/detokenize", json={"tokens": bare}).json()["prompt"] == "days"
        assert client.post("/tokenize", json={"prompt": "x", "add_special_tokens": 1}).status_code == 400


@pytest.mark.parametrize("special", [{}, {"add_special_tokens": False}, {"add_special": False}])
@pytest.mark.parametrize("name", ["parse_special", "allow_control_tokens"])
def test_spelled_control_tokens_are_text_to_tokenize_unless_asked_for(
    server: Served, engine: Engine, special: dict[str, bool], name: str
) -> None:
    (end,) = engine.encoding.encode_rest("<|end|>")
    with server.http as client:
        told = [
            client.post("/tokenize", json={"prompt": "a<|end|>b", **special, **more}).json()["tokens"]
            for more in ({}, {name: False}, {name: True})
        ]
        assert [end in tokens for tokens in told] == [False, False, True]
        assert client.post("/detokenize", json={"tokens": told[0]}).json()["content"].endswith("a<|end|>b")
        wrong = {"prompt": "x", "parse_special": True, "allow_control_tokens": True}
        assert client.post("/tokenize", json=wrong).status_code == 400
        assert client.post("/tokenize", json={"prompt": "x", name: "yes"}).status_code == 400


def test_a_drafter_that_failed_is_reported_by_card_and_metrics(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "drafter_failures", {"sibling": "ValueError: no"})
    with server.http as client:
        assert client.get("/v1/models").json()["data"][0]["meta"]["drafter_failures"] == {"sibling": "ValueError: no"}
        assert "specexec_drafters_failed 1\n" in client.get("/metrics").text


def test_an_answer_can_be_begun_for_the_model(server: Served, engine: Engine) -> None:
    begun = {"role": "assistant", "content": "I am the small"}
    with server.http as client:
        body = {"messages": [*QUESTION, begun], "continue_final_message": True, "temperature": 0, "max_tokens": 8}
        rest = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    text = engine.encoding.render(QUESTION) + "I am the small"
    plain = engine.generate(engine.encoding.encode_rest(text), SamplingParams(temperature=0, max_tokens=8))
    assert rest == plain.text


def test_a_tool_that_must_be_called_is_called(caller: Served) -> None:
    asked: dict[str, Any] = {
        "model": "letters",
        "messages": QUESTION,
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
    }
    with caller.openai() as client:
        ask: Any = client.chat.completions.create
        done = ask(**asked)
        (call,) = done.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather"
        assert arguments["city"] in ("Oslo", "Lima")
        assert 1 <= arguments["days"] <= 9
        assert (done.choices[0].finish_reason, done.choices[0].message.content) == ("tool_calls", None)

        chunks = list(ask(**asked, stream=True, seed=done.choices[0].model_extra["seed"]))
        (streamed,) = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
        assert streamed.function.arguments == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        more = {**asked, "messages": [*QUESTION, done.choices[0].message, result], "tool_choice": "none"}
        after = ask(**more, max_tokens=4)
        assert after.choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_with_a_schema_and_tools_an_answer_is_a_call_or_follows_the_schema(caller: Served, stream: bool) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    more: dict[str, Any] = {"tools": [CLOCK], "response_format": shape, "parallel_tool_calls": False}
    kinds = set()
    for seed in range(8):
        with caller.openai() as client:
            create: Any = client.chat.completions.create
            asked = {"model": "letters", "messages": QUESTION, "temperature": 2, "seed": seed, "max_tokens": 60, **more}
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    choice: Any = events.get_final_completion().choices[0]
            else:
                choice = create(**asked).choices[0]
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content)["city"] in ("Oslo", "Lima")
        else:
            assert [call.function.name for call in choice.message.tool_calls] == ["clock"]
    assert "stop" in kinds
    must = caller.ask("x", **{**more, "tool_choice": "required", "seed": 1}).json()["choices"][0]
    assert must["finish_reason"] == "tool_calls"


def test_a_schema_that_cannot_be_followed_is_refused_beside_tools_too(caller: Served) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    refused = caller.ask("x", tools=[CLOCK], response_format=shape)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
    refused = caller.ask("x", tools=[CLOCK], guided_regex="a|b")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_regex")


def test_tools_that_may_be_called_leave_room_for_text(caller: Served) -> None:
    free = caller.ask("What are you?", seed=1, max_tokens=12).json()["choices"][0]["message"]
    offered = caller.ask("What are you?", seed=1, max_tokens=12, tools=[WEATHER]).json()["choices"][0]["message"]
    assert offered["content"]
    assert "tool_calls" not in free


def test_template_variables_reach_the_template(caller: Served) -> None:
    moody = caller.ask("x", max_tokens=1, chat_template_kwargs={"mood": "grim and then some"}).json()
    assert moody["usage"]["prompt_tokens"] > caller.ask("x", max_tokens=1).json()["usage"]["prompt_tokens"]


def test_a_model_without_tools_says_so(server: Served) -> None:
    refused = server.ask("x", tools=[WEATHER]).json()["error"]
    assert (refused["param"], "chat template leaves tool calls out" in refused["message"]) == ("tools", True)


def test_a_refused_request_raises_in_the_client(server: Served) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="letters", messages=QUESTION, tools=[WEATHER])
    assert refusal.value.code == "unsupported_parameter"


def test_a_template_that_never_ends_is_stopped(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specexec.text.templates.SECONDS", 0.2)
    shutil.copytree(engine.folders["target"], tmp_path / "model")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(endless)
    with serving(lambda: specexec.load(str(tmp_path / "model"), drafter="none", dtype="f32")) as served:
        refused = served.ask("x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_messages")
    assert "did not end within" in refused.json()["error"]["message"]


PAGE = Path(__file__).parents[1] / "docs" / "server.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES[1:])
def test_the_examples_of_the_documentation_run(server: Served, code: str) -> None:
    exec(EXAMPLES[0].replace("http://127.0.0.1:8000", server.url) + code, {})
