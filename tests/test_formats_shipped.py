"""A model's own response template is used where no form of ours reads its calls, by transformers' parser."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import specexec
from cli.openai.errors import ApiError
from cli.openai.parse import read_chat
from cli.openai.prepare import bound_of
from specexec.errors import BadGrammar
from specexec.pieces import Piece
from specexec.text.formats import Format, format_of
from specexec.text.formats.probe import ARGUMENTS, Probe, tools
from specexec.text.formats.shipped import ShippedForm
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests.families import family
from tests.serving import serving
from tests.writer import writer

FAMILY = "llama_cpp/GigaChat3-10B-A1.8B"  # whose calls none of our forms reads
TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant<|role_sep|>\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?:<\|message_sep\|>\s*)?function call<\|role_sep\|>\n",
            "close": "<|message_sep|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": ["<|message_sep|>", "<|end_of_turn|>"], "content": "text"},
    },
}


def shipping(template: object) -> Encoding:
    tokenizer = family(FAMILY).tokenizer
    tokenizer.response_template = template
    return Encoding(tokenizer)


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return shipping(TEMPLATE)


@pytest.fixture(scope="module")
def form(encoding: Encoding) -> Format:
    return format_of(encoding, Wishes(tools=tools()))


def read(form: Format, encoding: Encoding, text: str, size: int = 0) -> Piece:
    ids = encoding.encode_rest(text)
    reader = form.reader(encoding.encode_rest(encoding.render([{"role": "user", "content": "Hi"}])))
    parts = [ids[at : at + size] for at in range(0, len(ids), size)] if size else [ids]
    whole = Piece()
    for part in parts:
        whole += reader.read(part, last=False)
    return whole + reader.read([], last=True)


def turns(encoding: Encoding) -> Iterator[str]:
    probe = Probe(encoding, Wishes())
    for turn in ({"calls": 1}, {"content": "Some text.", "calls": 1}, {"content": "Some text."}):
        shown = probe.answer(**turn)
        assert shown is not None
        yield shown.answer.rstrip("\n")


def test_calls_that_no_form_reads_are_read_by_the_models_own_template(encoding: Encoding, form: Format) -> None:
    without = format_of(family(FAMILY), Wishes(tools=tools()))
    assert (without.calls, form.calls, form.name, form.parallel) == (False, True, "response template", False)
    for text in turns(encoding):
        theirs = encoding.tokenizer.parse_response(
            text, prefix=encoding.render([{"role": "user", "content": "Hi"}]), tools=list(tools())
        )
        for size in (0, 1, 3):
            ours = read(form, encoding, text, size)
            called = [(call.name, json.loads(call.arguments)) for call in ours.calls]
            wanted = [
                (call["function"]["name"], call["function"]["arguments"]) for call in theirs.get("tool_calls", [])
            ]
            assert (ours.content, called) == (str(theirs.get("content") or "").strip(), wanted)
            assert called in ([], [ARGUMENTS[0]])


def test_a_thought_is_no_part_of_the_answer(encoding: Encoding, form: Format) -> None:
    piece = read(form, encoding, "<think>\nI must look.\n</think>\n\nIt rains.", 2)
    assert (piece.content, piece.reasoning, piece.calls) == ("It rains.", "I must look.", ())


def test_what_is_cut_or_is_no_call_comes_out_as_text(encoding: Encoding, form: Format) -> None:
    call = 'function call<|role_sep|>\n{"name": "probe_none", "arguments": {}}'
    ids = encoding.encode_rest(call)
    for size in range(1, len(ids)):
        text = encoding.raw(ids[:size])
        piece = read(form, encoding, text)
        assert piece.calls or piece.content.strip() == text.strip(), size
    odd = "function call<|role_sep|>\nprobe_none, please<|message_sep|>"
    piece = read(form, encoding, f"Well. {odd} More.")
    assert "".join(piece.content.split()) == "".join(f"Well. {odd} More.".split())


def test_forbidden_calls_are_content(encoding: Encoding, form: Format) -> None:
    call = 'function call<|role_sep|>\n{"name": "probe_none", "arguments": {}}'
    piece = read(form.without_calls, encoding, call)
    assert (piece.content, piece.calls) == (call, ())


@pytest.mark.parametrize(("choice", "bound"), [("auto", False), ("required", True)])
def test_calls_are_read_but_cannot_be_forced(encoding: Encoding, form: Format, choice: str, bound: bool) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": list(tools()),
        "tool_choice": choice,
    }
    asked = read_chat(body, ("m",))
    prompt = encoding.encode([{"role": "user", "content": "Hi"}])
    if not bound:
        assert bound_of(form, prompt, asked) is None
        return
    with pytest.raises(ApiError, match="not enforced"):
        bound_of(form, prompt, asked)
    with pytest.raises(BadGrammar):
        form.grammar(tools(), choice)


OTHER = {**TEMPLATE, "fields": {"content": {"close": "<|message_sep|>", "content": "text"}}}
EMPTY = json.loads(json.dumps(TEMPLATE).replace('"close": "</think>"', '"close_pattern": "x*"'))
DEEP = {**OTHER, "fields": {**TEMPLATE["fields"], "x": {"open_pattern": "(" * 3000 + ")" * 3000}}}
WRONG = json.loads(json.dumps(TEMPLATE).replace("function call", "call a function"))


@pytest.mark.parametrize(
    "template", [None, "x", {}, {"fields": {}}, {**TEMPLATE, "version": 9}, OTHER, WRONG, EMPTY, DEEP]
)
def test_a_template_that_does_not_read_the_models_calls_is_left_alone(template: object) -> None:
    found = format_of(shipping(template), Wishes(tools=tools()))
    assert "unknown way" in str(found.refusal)
    assert found.name != "response template"


def test_a_form_of_ours_goes_first() -> None:
    tokenizer = family("llama_cpp/Qwen-Qwen3-0.6B").tokenizer
    tokenizer.response_template = TEMPLATE
    found = format_of(Encoding(tokenizer), Wishes(tools=tools()))
    assert found.calls
    assert found.name == format_of(family("llama_cpp/Qwen-Qwen3-0.6B"), Wishes(tools=tools())).name


def test_a_server_reads_calls_by_the_template_in_the_models_folder(tmp_path: Path) -> None:
    call = json.dumps({"name": "look_up", "arguments": {"word": "x"}})
    source = family(FAMILY).tokenizer.chat_template
    cue = "assistant<|role_sep|>\n"
    folder = tmp_path / "model"
    shutil.copytree(
        writer("qwen3", f"I look.<|message_sep|>\n\nfunction call<|role_sep|>\n{call}", cue, source), folder
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": TEMPLATE}))
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "What is x?"}], "tools": [tool], "temperature": 0}
    with serving(lambda: specexec.load(str(folder), drafter="none", dtype="f32")) as served, served.http as client:
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        forced = client.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
    (made,) = answer["message"]["tool_calls"]
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("look_up", {"word": "x"})
    assert (answer["message"]["content"], answer["finish_reason"]) == ("I look.", "tool_calls")
    assert (forced.status_code, "not enforced" in forced.text) == (400, True)


def shipped(form: Format, change: Callable[[dict[str, Any]], object]) -> Format:
    """A form by a changed template, as if it had read its model's calls."""
    template = copy.deepcopy(TEMPLATE)
    change(template["fields"])
    assert isinstance(form.form, ShippedForm)
    return replace(form, form=replace(form.form, template=json.dumps(template)))


CALLED = 'function call<|role_sep|>\n{"name": "probe_none", "arguments": {"a": VALUE}}'
ENDLESS = r"(?:a|aa)+$c?d"  # tries every way to cut a run of a's


def test_patterns_that_do_not_end_cost_the_form_and_never_the_answer(
    encoding: Encoding, form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specexec.text.formats.shipped._SECONDS", 0.2)
    monkeypatch.setattr("specexec.text.templates.SECONDS", 0.2)
    opened = {"open_pattern": f"<think>|{ENDLESS}", "close": "</think>", "content": "text"}
    thought = shipped(form, lambda fields: fields.update(reasoning_content=opened))
    piece = read(thought, encoding, f"<think>hm</think>{'a' * 60}! More.")
    assert (piece.content, piece.reasoning) == (f"{'a' * 60}! More.", "hm")
    inside = {"content": "xml-inline", "content_args": {"tag_pattern": f"(?P<key>{ENDLESS})"}}
    tags = shipped(form, lambda fields: fields["tool_calls"].update(inside))
    call = CALLED.replace("VALUE", f'"{"a" * 60}"')
    assert read(tags, encoding, f"{call}<|message_sep|>").content.strip() == f"{call}<|message_sep|>"


@pytest.mark.parametrize("value", [r'"\ud800"', "1e999", "NaN", f"{'[' * 3000}{']' * 3000}"])
def test_arguments_that_json_cannot_hold_make_no_call(encoding: Encoding, form: Format, value: str) -> None:
    call = CALLED.replace("VALUE", value)
    assert (read(form, encoding, call).content, read(form, encoding, call).calls) == (call, ())


@pytest.mark.parametrize(
    "inside",
    [
        {"transform": {"function": "{nothing}"}},
        {"transform": {"function": {"name": 3, "arguments": {}}}},
        {"transform": "no call"},
        {"content": "xml-inline", "content_args": {"tag_pattern": "("}},
        {"content_args": {"string_delims": 5}},
        {"content_args": 3},
    ],
)
def test_what_the_parser_fails_at_comes_out_as_text(encoding: Encoding, form: Format, inside: dict[str, Any]) -> None:
    call = CALLED.replace("VALUE", "1")
    piece = read(shipped(form, lambda fields: fields["tool_calls"].update(inside)), encoding, call)
    assert (piece.content, piece.calls) == (call, ())


def test_a_field_that_must_be_there_costs_no_call(encoding: Encoding, form: Format) -> None:
    piece = read(
        shipped(form, lambda fields: fields["content"].update(optional=False)), encoding, CALLED.replace("VALUE", "1")
    )
    assert (piece.content, [call.arguments for call in piece.calls]) == ("", ['{"a": 1}'])
