"""Dialogues with models that think and call, on real tokenizers and templates: separated, continued, read again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import specexec
from cli.app import main
from cli.chat.archive import Archive
from cli.chat.saving import Keeper
from cli.shared.thinking import ask_to_think
from cli.terminal.screen import Screen
from specexec.engine.engine import Engine
from specexec.sampling.params import SamplingParams
from specexec.text.conversation import Conversation
from specexec.text.formats import Piece, format_of
from tests import real
from tests.command_line import stays_open
from tests.families import small_writer
from tests.writer import writer

CUE = "<|im_start|>assistant\n"
GREEDY = SamplingParams(temperature=0, max_tokens=200)
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "Zürich"}}\n</tool_call>'
QWEN3 = f"<think>\nHm, 日本?\nYes.\n</think>\n\nLet me look.\n{CALL}"
HARMONY = (
    "<|channel|>analysis<|message|>User says hello.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello! How can I help?"
)
MESSAGE = {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm, 日本?\nYes."}


def folder(text: str, template: str, cue: str) -> Path:
    return writer("qwen3", text, cue, real.templates()[f"llama_cpp/{template}"])


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    with specexec.load(str(folder(QWEN3, "Qwen-Qwen3-0.6B", CUE)), drafter="ngram", ctx=2048) as engine:
        yield engine


def said(talk: Conversation, text: str, sampling: SamplingParams = GREEDY) -> Piece:
    return sum((burst.piece for burst in talk.send(text, sampling)), Piece())


def without_ids(messages: list[dict[str, object]]) -> list[object]:
    """Messages as JSON; the ids of calls are drawn anew whenever an answer is read."""
    told = json.loads(json.dumps(messages))
    for message in told:
        for call in message.get("tool_calls", []):
            del call["id"]
    return list(told)


def test_thoughts_text_and_calls_are_separated(llm: Engine) -> None:
    talk = llm.conversation()
    piece = said(talk, "Where?")
    assert (piece.content, piece.reasoning) == (MESSAGE["content"], MESSAGE["reasoning_content"])
    assert [(call.name, json.loads(call.arguments)) for call in piece.calls] == [("look", {"at": "Zürich"})]
    assert {**talk.messages[-1], "tool_calls": None} == {**MESSAGE, "tool_calls": None}


def test_an_answer_cut_anywhere_goes_on_to_the_same_message(llm: Engine) -> None:
    whole = llm.conversation()
    piece = said(whole, "Where?")
    tokens = len(whole.keep().turns[-1].written)
    for size in range(1, tokens, 2):
        cut = llm.conversation()
        first = said(cut, "Where?", replace(GREEDY, max_tokens=size))
        assert cut.can_proceed
        rest = sum((burst.piece for burst in cut.proceed(GREEDY)), Piece())
        assert without_ids(cut.messages) == without_ids(whole.messages)
        assert (first + rest).reasoning == piece.reasoning
        assert (first + rest).content.startswith(piece.content[: len((first + rest).content)])


def test_the_next_prompt_is_what_the_template_makes_of_the_messages(llm: Engine, tmp_path: Path) -> None:
    talk, again = llm.conversation("Be brief."), llm.conversation()
    archive = Archive(tmp_path)
    keeper = Keeper(archive, archive.new("qwen3"), llm, talk, Screen())
    said(talk, "Where?")
    said(talk, "And then?", replace(GREEDY, max_tokens=7))
    keeper.save()
    Keeper(archive, archive.load(keeper.id), llm, again, Screen()).resume()
    for one in (talk, again):
        said(one, "Why?")
        turn = one.keep().turns[-1]
        asked: Any = turn.asked
        shown = llm.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert llm.encoding.raw(turn.prompt) == shown
    assert talk.keep().turns[-1].prompt == again.keep().turns[-1].prompt


def test_a_pipe_gets_the_answer_and_its_calls_and_stderr_the_thoughts(
    llm: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    stays_open(monkeypatch, llm)
    path = str(llm.folders["target"])
    ask = ["chat", "-m", path, "-d", "none", "-p", "Where?", "-t", "0", "--no-stats", "--ctx", "2k"]
    assert main(ask) == 0
    out, err = capsys.readouterr()
    assert out == 'Let me look.\n→ look({"at": "Zürich"})\n'
    assert "Hm, 日本?\nYes.\n  thought for " in err
    assert main([*ask, "-q"]) == 0
    assert tuple(capsys.readouterr()) == (out, "")
    assert main([*ask, "--hide-thinking"]) == 0
    assert "Hm" not in capsys.readouterr().err
    assert main([*ask, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["reasoning"]) == (MESSAGE["content"], MESSAGE["reasoning_content"])
    assert [(call["name"], call["arguments"]) for call in told["calls"]] == [("look", '{"at": "Zürich"}')]


def test_levels_of_thinking_tell_the_template_or_say_that_they_do_not(
    llm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    ask_to_think(llm, "off", told.append)
    assert llm.encoding.render([{"role": "user", "content": "x"}]).endswith("<think>\n\n</think>\n\n")
    ask_to_think(llm, "auto", told.append)
    assert not llm.encoding.thinking
    assert told == [f"think off: {format_of(llm.encoding).thinking('off').effect}"]
    assert "enable_thinking=False" in told[0]


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        ("vllm/template_chatml", "Rain, 日本?\n\nYes.", {"content": "Rain, 日本?\n\nYes."}),
        (  # the prompt opens the thought
            "llama_cpp/GLM-4.7-Flash",
            "Hm, 日本?\nYes.\n</think>\n\nLet me look.",
            {"content": MESSAGE["content"], "reasoning_content": MESSAGE["reasoning_content"]},
        ),
    ],
)
def test_plain_answers_and_thoughts_that_the_prompt_opens_go_on_too(
    template: str, text: str, message: dict[str, str], tmp_path: Path
) -> None:
    small_writer(tmp_path, template, [([{"role": "user", "content": "Rain today"}], f"{text}<|im_end|>")])
    with specexec.load(str(tmp_path), drafter="none", dtype="f32", ctx=1024) as llm:
        whole = llm.conversation()
        said(whole, "Rain today")
        assert whole.messages[-1] == {"role": "assistant", **message}
        for size in range(1, len(whole.keep().turns[-1].written), 2):
            cut = llm.conversation()
            said(cut, "Rain today", replace(GREEDY, max_tokens=size))  # the cut may be inside a character
            assert list(cut.proceed(GREEDY))
            assert cut.messages == whole.messages


@pytest.fixture(scope="module")
def harmony() -> Iterator[Engine]:
    template = real.templates()["llama_cpp/openai-gpt-oss-120b"]
    folder = writer("gptoss", HARMONY, "<|start|>assistant", template)
    with specexec.load(str(folder), drafter="ngram", ctx=2048) as engine:
        yield engine


def test_a_harmony_answer_is_separated_and_cut_anywhere_goes_on_to_the_same_message(harmony: Engine) -> None:
    whole = harmony.conversation()
    piece = said(whole, "Hi")
    assert (piece.reasoning, piece.content) == ("User says hello.", "Hello! How can I help?")
    assert not whole.can_proceed
    for size in range(1, len(whole.keep().turns[-1].written), 2):
        cut = harmony.conversation()
        said(cut, "Hi", replace(GREEDY, max_tokens=size))
        assert cut.can_proceed
        for _ in cut.proceed(GREEDY):
            pass
        assert cut.messages == whole.messages


@pytest.mark.parametrize("size", [200, 3, 7, 13])  # whole; cut in a header, in the thought and in the answer
def test_the_next_prompt_of_harmony_is_what_its_template_makes_of_the_messages(harmony: Engine, size: int) -> None:
    talk = harmony.conversation("Be brief.")
    for text in ("Hi", "Again", "Why?"):
        said(talk, text, replace(GREEDY, max_tokens=size))
        turn = talk.keep().turns[-1]
        asked: Any = turn.asked
        shown = harmony.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert harmony.encoding.raw(turn.prompt) == shown
