"""One answer, told apart into content, reasoning and calls, whatever the chunking: on real tokenizers and templates."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specexec.sampling.grammar import Grammars
from specexec.text.formats import Format, Piece, format_of
from specexec.text.formats.thinking import Level
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests import real
from tests.families import small_family

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
QWEN3 = (
    "<think>\nShould I <tool_call> now?\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}\n</tool_call>'
)


@cache
def encoding(tokenizer: str, template: str | None = None) -> Encoding:
    found = copy.copy(real.pretrained(tokenizer))
    if template is not None:
        found.chat_template = real.templates()[template]
    return Encoding(found)


def read(form: Format, ids: list[int], sizes: list[int] = [], prompt: str = "") -> Piece:  # noqa: B006
    """The whole answer, read in chunks of these sizes and then the rest at once."""
    assert isinstance(form.encoding, Encoding)
    reader = form.reader(form.encoding.encode_rest(prompt))
    piece = Piece()
    for size in sizes:
        piece += reader.read(ids[:size], last=False)
        ids = ids[size:]
    return piece + reader.read(ids, last=True)


def said(piece: Piece) -> tuple[str, str, list[tuple[str, object]]]:
    return piece.content, piece.reasoning, [(call.name, json.loads(call.arguments)) for call in piece.calls]


def test_thought_text_and_calls_are_separated() -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    assert said(read(format_of(words), words.encode_rest(QWEN3))) == (
        "Let me look.",
        "Should I <tool_call> now?",
        [("get_weather", {"city": "Zürich", "days": 2}), ("get_weather", {"city": "a </tool_call> b"})],
    )


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), max_size=60), cut=st.integers(0, 75))
def test_any_chunking_gives_the_same_pieces(sizes: list[int], cut: int) -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    ids = words.encode_rest(QWEN3)[:cut]
    assert said(read(format_of(words), ids, sizes)) == said(read(format_of(words), ids))


def test_a_call_cut_short_is_text_and_nothing_of_it_is_lost() -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    text = 'Well. <tool_call>\n{"name": "get_weather", "argum'
    assert read(format_of(words), words.encode_rest(text)) == Piece(content=text)


def test_a_whole_call_that_was_cut_before_its_end_mark_is_a_call() -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}'
    piece = read(format_of(words), words.encode_rest(f"Well. {call}\n"))
    assert said(piece) == ("Well.", "", [("get_weather", {"city": "Bern"})])
    assert read(format_of(words), words.encode_rest(call[:-1])) == Piece(content=call[:-1])


@pytest.mark.parametrize("family", ["hermes", "harmony"])
def test_a_forbidden_call_is_text_in_full(family: str) -> None:
    if family == "hermes":
        words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
        call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    else:
        words = encoding("gptoss", "llama_cpp/openai-gpt-oss-120b")
        call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"city": "Bern"}'
    ids, prompt = words.encode_rest(call), words.encode([{"role": "user", "content": "hi"}])
    form = format_of(words)
    assert [one.name for one in form.reader(prompt).read(ids, last=True).calls] == ["f"]
    piece = form.without_calls.reader(prompt).read(ids, last=True)
    assert (piece.calls, piece.reasoning) == ((), "")
    assert piece.content.endswith(call)


def test_a_level_of_thinking_without_effect_is_said_plainly() -> None:
    none = format_of(encoding("llama3_1", "llama_cpp/meta-llama-Llama-3.1-8B-Instruct")).thinking("low")
    assert (none.variables, none.effect) == ({}, "this model's chat template has no variable for how much to think.")
    always = format_of(encoding("gptoss", "llama_cpp/openai-gpt-oss-120b")).thinking("off")
    assert (always.variables, always.effect) == ({}, "this model's chat template knows only on, low, medium, high.")
    same = format_of(encoding("qwen3", "llama_cpp/upstage-Solar-Open-100B")).thinking("off")
    assert same == always


def test_a_mark_spelled_out_is_text_where_the_tokenizer_has_a_token() -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    ids = [id for part in ("<tool", "_call>", "{}", "</tool", "_call>") for id in words.encode_rest(part)]
    assert read(format_of(words), ids) == Piece(content="<tool_call>{}</tool_call>")


def test_a_thought_that_the_prompt_opened_goes_on() -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    ids = words.encode_rest("Hm.\n</think>\n\nYes.")
    assert read(format_of(words), ids, prompt="<|im_start|>assistant\n<think>\n") == Piece("Yes.", "Hm.")


@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
def test_a_grammar_takes_the_calls_of_its_own_form(choice: str) -> None:
    words = encoding("qwen3", "llama_cpp/Qwen-Qwen3-0.6B")
    bound = format_of(words).grammar(TOOLS, choice)
    grammar = Grammars(words.tokenizer, 151_936, [words.tokenizer.eos_token_id]).grammar(bound.text)
    answers = [QWEN3, QWEN3.partition("</think>\n\n")[2]] if choice == "auto" else [QWEN3.replace("Let me look.\n", "")]
    for answer in [*answers, answers[0].replace("Should I <tool_call> now", "Hm")]:
        parse = grammar.start()
        ids = words.encode_rest(answer.replace("a </tool_call> b", "Basel").replace("I <tool_call> now", "I"))
        parse.advance(ids)
        assert parse.failure is None
        assert parse.allowed([()], 151_936)[0, words.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("stop", "content", "reasoning", "calls"),
    [
        ("me lo", "Let ", "Should I <tool_call> now?", 0),
        ("now", "", "Should I <tool_call> ", 0),
        ("Zürich", "Let me look.", "Should I <tool_call> now?", 2),  # only in a call
        ("look.!", "Let me look.", "Should I <tool_call> now?", 2),  # begins and does not end
    ],
)
@pytest.mark.parametrize("size", [1, 3, 500])
def test_nothing_is_given_out_after_a_stop_text(stop: str, content: str, reasoning: str, calls: int, size: int) -> None:
    encoding = small_family("llama_cpp/Qwen-Qwen3-0.6B")
    ids = encoding.encode_rest(QWEN3)
    reader = format_of(encoding).reader(encoding.encode([{"role": "user", "content": "Rain?"}]), stop=(stop,))
    piece = sum((reader.read(ids[at : at + size], at + size >= len(ids)) for at in range(0, len(ids), size)), Piece())
    assert (piece.content, piece.reasoning, len(piece.calls)) == (content, reasoning, calls)
    assert reader.stopped == (calls == 0)


@pytest.mark.parametrize(
    ("template", "level", "variables"),
    [
        ("llama_cpp/ByteDance-Seed-OSS", "low", {"thinking_budget": 512}),
        ("llama_cpp/ByteDance-Seed-OSS", "on", {"thinking_budget": 2048}),
        ("llama_cpp/tencent-Hy3", "off", {"reasoning_effort": "no_think"}),
        ("llama_cpp/tencent-Hy3", "medium", {"reasoning_effort": "high"}),
        ("llama_cpp/openai-gpt-oss-120b", "high", {"reasoning_effort": "high"}),
        ("llama_cpp/deepseek-ai-DeepSeek-V3.1", "on", {"enable_thinking": True, "thinking": True}),
        ("llama_cpp/Qwen-Qwen3-0.6B", "off", {"enable_thinking": False}),
    ],
)
def test_a_level_of_thinking_is_given_to_the_template(
    template: str, level: Level, variables: dict[str, object]
) -> None:
    encoding = small_family(template)
    found = format_of(encoding).thinking(level)
    assert found.variables == variables
    assert all(f"{name}={value}" in found.effect for name, value in variables.items())
    told, other = (
        encoding.render([{"role": "user", "content": "Rain?"}], Wishes(variables=known))
        for known in (variables, format_of(encoding).thinking("low" if level in ("off", "high") else "off").variables)
    )
    assert (told != other) or not variables


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("vllm/tool_chat_template_hermes", "has no variable for how much to think."),
        (None, "the model has no chat template that could set how much to think."),
    ],
)
def test_a_level_that_has_no_effect_is_named(template: str | None, reason: str) -> None:
    encoding = small_family(template or "llama_cpp/Qwen-Qwen3-0.6B")
    if template is None:
        encoding.tokenizer.chat_template = None
    found = format_of(encoding).thinking("off")
    assert (dict(found.variables), found.effect.endswith(reason)) == ({}, True)
