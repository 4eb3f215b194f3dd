"""Which real template's calls are read, and as which form: call → text → call is the identity, or refused."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest

from specexec.text.formats import Format, Piece, format_of
from specexec.text.formats.probe import Asked, Probe, tools
from specexec.text.formats.table import CallForm
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests import real
from tests.families import family

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from formats_table import BEGIN, END, PAGE, row

READ = {
    "llama_cpp/Apertus-8B-Instruct": "apertus",
    "llama_cpp/Apriel-1.6-15b-Thinker-fixed": "tool-calls",
    "llama_cpp/Bielik-11B-v3.0-Instruct": "hermes",
    "llama_cpp/ByteDance-Seed-OSS": "seed",
    "llama_cpp/Cohere2MoE": "command",
    "llama_cpp/CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command",
    "llama_cpp/GLM-4.6": "glm-4.5",
    "llama_cpp/GLM-4.7-Flash": "glm-4.7",
    "llama_cpp/GigaChat3.1-10B-A1.8B": "gigachat-3.1 once",
    "llama_cpp/Kimi-K3": "kimi-k3",
    "llama_cpp/LFM2.5-8B-A1B": "lfm-2",
    "llama_cpp/MiMo-VL": "hermes",
    "llama_cpp/MiniMax-M1": "minimax-m1",
    "llama_cpp/MiniMax-M2": "minimax-m2",
    "llama_cpp/Mistral-Small-3.2-24B-Instruct-2506": "mistral-call-id",
    "llama_cpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3-coder",
    "llama_cpp/NVIDIA-Nemotron-Nano-v2": "nemotron-2",
    "llama_cpp/NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "llama_cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "llama_cpp/Qwen-QwQ-32B": "hermes",
    "llama_cpp/Qwen-Qwen2.5-7B-Instruct": "hermes",
    "llama_cpp/Qwen-Qwen3-0.6B": "hermes",
    "llama_cpp/Qwen3-Coder": "qwen3-coder",
    "llama_cpp/Qwen3.5-4B": "qwen3-coder",
    "llama_cpp/Reka-Edge": "hermes",
    "llama_cpp/Spark2.5": "glm-4.7",
    "llama_cpp/StepFun3.5-Flash": "qwen3-coder",
    "llama_cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek-v3",
    "llama_cpp/deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "llama_cpp/deepseek-ai-DeepSeek-V3.2": "deepseek-v3.2",
    "llama_cpp/deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek-v4",
    "llama_cpp/deepseek-ai-DeepSeek-V4": "deepseek-v4",
    "llama_cpp/google-gemma-4-31B-it-interleaved": "gemma-4",
    "llama_cpp/google-gemma-4-31B-it": "gemma-4",
    "llama_cpp/ibm-granite-granite-4.0": "hermes",
    "llama_cpp/ibm-granite-granite-4.1": "hermes",
    "llama_cpp/inclusionai-ling-3.0-flash": "glm-4.5",
    "llama_cpp/meetkai-functionary-medium-v3.1": "functionary-3.1",
    "llama_cpp/meta-llama-Llama-3.1-8B-Instruct": "llama-3 once",
    "llama_cpp/meta-llama-Llama-3.2-3B-Instruct": "llama-3 once",
    "llama_cpp/meta-llama-Llama-3.3-70B-Instruct": "llama-3 once",
    "llama_cpp/mistralai-Ministral-3-14B-Reasoning-2512": "mistral-args",
    "llama_cpp/mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "llama_cpp/moonshotai-Kimi-K2": "kimi-k2",
    "llama_cpp/muse-glimmer": "muse",
    "llama_cpp/openai-gpt-oss-120b": "harmony once",
    "llama_cpp/openbmb-MiniCPM5-1B": "minicpm-5",
    "llama_cpp/poolside-Laguna-S-2.1": "glm-4.7",
    "llama_cpp/poolside-Laguna-XS-2.1": "glm-4.5",
    "llama_cpp/poolside-Laguna-XS.2": "glm-4.5",
    "llama_cpp/tencent-Hy3": "hunyuan-3",
    "llama_cpp/unsloth-Apriel-1.5": "tool-calls",
    "llama_cpp/unsloth-mistral-Devstral-Small-2507": "mistral-args",
    "llama_cpp/upstage-Solar-Open-100B": "solar",
    "vllm/tool_chat_template_apertus": "apertus",
    "vllm/tool_chat_template_deepseekr1": "deepseek-v3",
    "vllm/tool_chat_template_deepseekv3": "deepseek-v3",
    "vllm/tool_chat_template_deepseekv31": "deepseek-v3.1",
    "vllm/tool_chat_template_functiongemma": "functiongemma",
    "vllm/tool_chat_template_gemma4": "gemma-4",
    "vllm/tool_chat_template_granite": "granite-3",
    "vllm/tool_chat_template_granite_20b_fc": "granite-20b",
    "vllm/tool_chat_template_hermes": "hermes",
    "vllm/tool_chat_template_hunyuan_a13b": "tool-calls",
    "vllm/tool_chat_template_internlm2_tool": "internlm-2",
    "vllm/tool_chat_template_llama3.1_json": "llama-3 once",
    "vllm/tool_chat_template_llama3.2_json": "llama-3 once",
    "vllm/tool_chat_template_llama3.2_pythonic": "pythonic",
    "vllm/tool_chat_template_llama4_json": "llama-3",
    "vllm/tool_chat_template_llama4_pythonic": "pythonic",
    "vllm/tool_chat_template_mistral": "mistral",
    "vllm/tool_chat_template_mistral3": "mistral",
    "vllm/tool_chat_template_mistral_parallel": "mistral",
    "vllm/tool_chat_template_muse_glimmer": "muse",
    "vllm/tool_chat_template_phi4_mini": "phi-4-mini",
    "vllm/tool_chat_template_qwen3coder": "qwen3-coder",
    "vllm/tool_chat_template_toolace": "pythonic",
    "vllm/tool_chat_template_xlam_llama": "json-list",
    "vllm/tool_chat_template_xlam_qwen": "json-list",
}
REFUSED = {
    "llama_cpp/CohereForAI-c4ai-command-r-plus-tool_use": "refuses",
    "llama_cpp/GigaChat3-10B-A1.8B": "unknown way",
    "llama_cpp/HuggingFaceTB-SmolLM3-3B": "leaves tool calls out",
    "llama_cpp/Kimi-K2-Instruct": "refuses",
    "llama_cpp/Kimi-K2-Thinking": "refuses",
    "llama_cpp/LFM2-8B-A1B": "leaves tool calls out",
    "llama_cpp/LFM2.5-Instruct": "leaves tool calls out",
    "llama_cpp/MiniMax-M3": "unknown way",
    "llama_cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "leaves tool calls out",
    "llama_cpp/fireworks-ai-llama-3-firefunction-v2": "refuses",
    "llama_cpp/google-gemma-2-2b-it": "leaves tool calls out",
    "llama_cpp/ibm-granite-granite-3.3-2B-Instruct": "leaves tool calls out",
    "llama_cpp/llama-cpp-deepseek-r1": "refuses",
    "llama_cpp/llama-cpp-rwkv-world": "leaves tool calls out",
    "llama_cpp/meetkai-functionary-medium-v3.2": "unknown way",
    "llama_cpp/microsoft-Phi-3.5-mini-instruct": "leaves tool calls out",
    "vllm/bge-reranker-v2-gemma": "refuses",
    "vllm/dse_qwen2_vl": "leaves tool calls out",
    "vllm/mxbai_rerank_v2": "refuses",
    "vllm/nemotron-rerank": "refuses",
    "vllm/nemotron-vl-rerank": "refuses",
    "vllm/nemotron_embed_vl": "refuses",
    "vllm/qwen3_reranker": "refuses",
    "vllm/qwen3_vl_reranker": "refuses",
    "vllm/template_alpaca": "leaves tool calls out",
    "vllm/template_chatglm": "leaves tool calls out",
    "vllm/template_chatglm2": "leaves tool calls out",
    "vllm/template_chatml": "leaves tool calls out",
    "vllm/template_falcon": "leaves tool calls out",
    "vllm/template_falcon_180b": "leaves tool calls out",
    "vllm/template_inkbot": "leaves tool calls out",
    "vllm/template_teleflm": "leaves tool calls out",
    "vllm/tool_chat_template_gemma3_pythonic": "unknown way",
    "vllm/tool_chat_template_glm4": "leaves tool calls out",
    "vllm/vlm2vec_phi3v": "refuses",
    "vllm/vlm2vec_qwen2vl": "refuses",
    "vllm/zerank2": "refuses",
}
# Templates that write a turn of the history in another way than their model writes it, or leave no mark to see.
NOT_ALIKE = {
    "llama_cpp/Apriel-1.6-15b-Thinker-fixed": "opens a thought in the prompt and leaves that out of the history",
    "llama_cpp/NVIDIA-Nemotron-Nano-v2": "opens a thought before every turn of the history and never closes it",
    "llama_cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "writes the text of a turn with calls as a turn of its own",
    "llama_cpp/openai-gpt-oss-120b": "writes the text of a turn with calls as a thought",
    "vllm/tool_chat_template_hunyuan_a13b": "writes a role before text, of which the prompt says nothing",
    "vllm/tool_chat_template_llama4_json": "no mark between text and call: only a whole answer is a call",
    "vllm/tool_chat_template_phi4_mini": "leaves the calls out of a turn with text",
    "vllm/tool_chat_template_llama4_pythonic": "no mark between text and call: only a whole answer is a call",
}
ASKED: Asked = (
    (
        "write_file",
        {
            "path": "src/Zürich 東京.py",
            "text": 'if a < b and c > d:\n\n    print("it\'s <b>bold</b>", {"k": [1]})\n',
            "lines": 12,
            "ratio": -2.5,
            "append": False,
            "tags": ["x", "y, z", "<i>"],
            "options": {"mode": {"octal": "0644"}, "depth": 3, "names": []},
        },
    ),
    ("list_all", {}),
    ("look-up", {"word": "1234", "exact": True, "limit": 0}),
)


def answers(encoding_format: Format, probe: Probe, **shown: object) -> tuple[str, Piece]:
    """What the template wrote for this turn, and what is read in it."""
    answer = probe.answer(**shown)  # type: ignore[arg-type]
    assert answer is not None
    encode = probe.encoding.encode_rest  # type: ignore[attr-defined]
    ids = encode(answer.answer)
    ends = encoding_format.control_tokens.intersection(encode(probe.ending()))
    size = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return answer.answer, encoding_format.reader(encode(answer.prompt)).read(ids[:size], last=True)


def values(piece: Piece) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in piece.calls]


def test_every_template_is_in_the_table() -> None:
    assert sorted([*READ, *REFUSED]) == sorted(real.templates())
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [*real.templates()]


@cache
def known(template: str, spelled: bool = False) -> tuple[Encoding, Format, Probe]:
    """A template, its form, and what shows how it writes; found out once for all tests."""
    encoding = family(template, spelled)
    return encoding, format_of(encoding, Wishes(tools=tools(ASKED))), Probe(encoding, Wishes(), ASKED)


@pytest.mark.parametrize("spelled", [False, True], ids=["marks as tokens", "marks spelled out"])
def test_calls_come_back_as_they_went_in(spelled: bool) -> None:
    wrong = {}
    for template, form in READ.items():
        _, found, probe = known(template, spelled)
        name = found.name if found.parallel else f"{found.name} once"
        _, one = answers(found, probe, calls=1)
        assert spelled or row(template, found) in PAGE.read_text(encoding="utf-8")
        several = answers(found, probe, calls=3)[1] if found.parallel else one
        if name != form or values(one) != [*ASKED[:1]] or values(several) != [*ASKED[: 3 if found.parallel else 1]]:
            wrong[template] = name, found.refusal, one, several
    assert not wrong


# Forms in which nothing but the end mark says that no further argument comes, and LFM2's template, which writes strings
# with quotes inside as no Python has them.
OPEN = {
    "lfm-2",
    "glm-4.5",
    "glm-4.7",
    "hunyuan-3",
    "minimax-m2",
    "deepseek-v3.2",
    "deepseek-v4",
    "minicpm-5",
    "kimi-k3",
}


def test_a_call_that_was_cut_before_its_end_mark_is_a_call_if_it_is_known_to_be_whole() -> None:
    wrong = {}
    for template in {form: template for template, form in READ.items()}.values():
        encoding, found, probe = known(template)
        shown = probe.answer(calls=1)
        end = found.form.shape.end if isinstance(found.form, CallForm) else "</atem:function_calls>"
        if shown is None or not end or end not in shown.answer:
            continue
        text = shown.answer[: shown.answer.rindex(end)]
        piece = found.reader(encoding.encode_rest(shown.prompt)).read(encoding.encode_rest(text), last=True)
        if values(piece) != ([] if found.name in OPEN else [*ASKED[:1]]) or bool(piece.content) == bool(piece.calls):
            wrong[found.name] = piece
    assert not wrong


def test_thoughts_and_text_come_back_where_the_template_writes_them() -> None:
    wrong = {}
    for template in READ.keys() - NOT_ALIKE.keys():
        _, found, probe = known(template)
        turns: list[dict[str, object]] = [
            {"content": "Some text."},
            {"content": "Some text.", "reasoning": "A thought."},
            {"content": "Some text.", "reasoning": "A thought.", "calls": 1},
            {"content": "Some text.", "calls": 1},
            {"reasoning": "A thought.", "calls": 1},
        ]
        for turn in turns:
            if probe.answer(**turn) is None:  # type: ignore[arg-type]
                continue
            text, piece = answers(found, probe, **turn)
            expected = [
                str(turn[key]) if key in turn and str(turn[key]) in text else "" for key in ("content", "reasoning")
            ]
            if [piece.content.strip(), piece.reasoning] != expected or len(piece.calls) != turn.get("calls", 0):
                wrong[template, str(turn)] = text, piece
    assert not wrong


def test_what_is_not_read_is_refused_by_name() -> None:
    found = {template: format_of(family(template)) for template in REFUSED}
    said = {template: str(form.refusal) for template, form in found.items()}
    assert all(reason in said[template] for template, reason in REFUSED.items()), said
    assert not any(form.calls for form in found.values())
    page = PAGE.read_text(encoding="utf-8")
    assert [row(template, form) for template, form in found.items() if row(template, form) not in page] == []
