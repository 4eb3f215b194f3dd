"""Thoughts and calls over HTTP of families that write answers as messages, or whose prompt opens the thought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import specexec
from tests.families import small_writer
from tests.serving import Served, serving

THOUGHT = "I must look."
ARGUMENTS = {"city": "Zürich", "days": 2}
CALL = json.dumps(ARGUMENTS, ensure_ascii=False)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
QUESTION: list[Any] = [{"role": "user", "content": "Rain today"}]
RESULT = "A clear night"
CALLED: dict[str, Any] = {
    "role": "assistant",
    "reasoning_content": THOUGHT,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}],
}
HARMONY = (
    (
        QUESTION,
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CALL}<|call|>",
    ),
    (
        [*QUESTION, CALLED, {"role": "tool", "tool_call_id": "call_1", "content": RESULT}],
        "<|channel|>analysis<|message|>So it is dry.<|end|><|start|>assistant"
        "<|channel|>final<|message|>No rain.<|return|>",
    ),
)
OPENED = (
    (
        QUESTION,
        f"{THOUGHT}\n</think>\n\nLet me look.\n<tool_call>get_weather"
        "<arg_key>city</arg_key><arg_value>Zürich</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call><|im_end|>",
    ),
)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served("llama_cpp/openai-gpt-oss-120b", HARMONY, tmp_path_factory)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served("llama_cpp/GLM-4.7-Flash", OPENED, tmp_path_factory)


def served(
    template: str, answers: tuple[tuple[list[Any], str], ...], folders: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = folders.mktemp("family") / "model"
    small_writer(folder, template, answers)
    with serving(lambda: specexec.load(str(folder), drafter="none", dtype="f32")) as server:
        yield server


def ask(server: Served, messages: list[Any], stream: bool, **more: object) -> dict[str, Any]:
    """What a client makes of an answer, whole or streamed."""
    asked = {"model": "letters", "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 99, **more}
    with server.openai() as client:
        create: Any = client.chat.completions.create
        if not stream:
            choice = create(**asked).choices[0]
            return {**choice.message.model_dump(exclude_none=True), "finish_reason": choice.finish_reason}
        chunks = list(create(**asked, stream=True))
    deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) for chunk in chunks if chunk.choices]
    found: dict[str, Any] = {"role": "assistant", "finish_reason": chunks[-1].choices[0].finish_reason}
    for name in ("content", "reasoning_content"):
        if text := "".join(delta.get(name, "") for delta in deltas):
            found[name] = text
    if calls := [call for delta in deltas for call in delta.get("tool_calls", [])]:
        found["tool_calls"] = calls
    return found


def called(answer: dict[str, Any]) -> list[tuple[str, object]]:
    calls = [call["function"] for call in answer.get("tool_calls", [])]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_harmony_thinks_calls_and_answers_when_the_result_is_there(harmony: Served, stream: bool) -> None:
    first = ask(harmony, QUESTION, stream)
    assert (first["reasoning_content"], first.get("content"), called(first), first["finish_reason"]) == (
        THOUGHT, None, [("get_weather", ARGUMENTS)], "tool_calls"
    )  # fmt: skip
    history = {name: first[name] for name in ("role", "reasoning_content", "tool_calls")}
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": RESULT}
    last = ask(harmony, [*QUESTION, history, result], stream)
    assert (last["reasoning_content"], last["content"], called(last), last["finish_reason"]) == (
        "So it is dry.", "No rain.", [], "stop"
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_thought_that_the_prompt_opened_is_no_content(opened: Served, stream: bool) -> None:
    answer = ask(opened, QUESTION, stream)
    assert (answer["reasoning_content"], answer["content"]) == (THOUGHT, "Let me look.")
    assert (called(answer), answer["finish_reason"]) == ([("get_weather", ARGUMENTS)], "tool_calls")
    cut = ask(opened, QUESTION, stream, max_tokens=2)
    assert (cut["reasoning_content"], cut.get("content", ""), cut["finish_reason"]) == ("I must", "", "length")
    forced = ask(opened, QUESTION, stream, tool_choice="required")
    assert (forced["reasoning_content"], forced.get("content"), called(forced)) == (THOUGHT, None, called(answer))
