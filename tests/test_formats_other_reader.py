"""What transformers' own parser reads in an answer is what ours reads, for the families whose templates it knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specexec.text.formats import format_of
from specexec.text.formats.probe import Asked, Probe, tools
from specexec.text.template_options import Wishes
from tests.families import family

ASKED: Asked = (("get_weather", {"city": "Zürich <b>, {x}", "days": 3}), ("look_up", {"word": "x y", "exact": True}))
KNOWN = {"llama_cpp/Qwen-Qwen3-0.6B": "qwen3", "llama_cpp/Qwen3.5-4B": "qwen3_5"} | {
    f"llama_cpp/google-gemma-4-31B-it{kind}": "gemma4" for kind in ("", "-interleaved")
}
TURNS: list[dict[str, Any]] = [
    {"content": "Some text."},
    {"content": "Some text.", "reasoning": "A thought.\n\nAnother."},
    {"calls": 1},
    {"calls": 2},
    {"reasoning": "A thought.", "calls": 2},
    {"content": "Some text.", "reasoning": "A thought.", "calls": 1},
]


def said(content: object, reasoning: object, calls: list[tuple[str, object]]) -> tuple[str, str, list[Any]]:
    return str(content or "").strip(), str(reasoning or "").strip(), calls


def test_both_read_the_same() -> None:
    found = pytest.importorskip("transformers.cli.serving.utils", reason="transformers' server is not installed")
    schemas = {model: schema for models, schema in found._RESPONSE_TEMPLATE_FALLBACKS.items() for model in models}
    wrong, compared = {}, 0
    for template, model in KNOWN.items():
        encoding = family(template)
        form = format_of(encoding, Wishes(tools=tools(ASKED)))
        probe = Probe(encoding, Wishes(), ASKED)
        for turn in TURNS:
            shown = probe.answer(**turn)
            if shown is None:
                continue
            ids = encoding.encode_rest(shown.answer)
            ends = form.control_tokens.intersection(encoding.encode_rest(probe.ending()))
            ids = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
            ours = form.reader(encoding.encode_rest(shown.prompt)).read(ids, last=True)
            theirs = encoding.tokenizer.parse_response(
                encoding.raw(ids), schemas[model], prefix=shown.prompt, tools=list(tools(ASKED))
            )
            calls = [call["function"] for call in theirs.get("tool_calls") or []]
            expected = said(
                theirs.get("content"),
                theirs.get("reasoning_content"),
                [(call["name"], call["arguments"]) for call in calls],
            )
            mine = said(ours.content, ours.reasoning, [(call.name, json.loads(call.arguments)) for call in ours.calls])
            compared += 1
            assert len(ours.calls) == turn.get("calls", 0)
            if mine != expected:
                wrong[template, str(turn)] = shown, mine, expected
    assert not wrong, "\n\n".join(map(str, wrong.items()))
    assert compared > len(TURNS)
