"""Real chat templates with tokenizers in which the marks they write are tokens, as in the tokenizers of their models.

We have seven real tokenizers for 119 templates: where a template's own is not among them, Qwen 3's stands in, to which
the marks are added.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specexec.text.tokenizer import Encoding
from tests import real
from tests.writer import Saying, save

OWN = {
    "llama_cpp/Qwen-Qwen3-0.6B": "qwen3",
    "llama_cpp/openai-gpt-oss-120b": "gptoss",
    "llama_cpp/mistralai-Mistral-Nemo-Instruct-2407": "mistral_nemo",
    "llama_cpp/meta-llama-Llama-3.1-8B-Instruct": "llama3_1",
    "vllm/tool_chat_template_deepseekv3": "deepseek_v3",
}
# Marks that end a turn or begin one; all others are spelled out where a test wants them so.
_TURN = re.compile(
    r"im_|eot|eom|end_of|start_of|role|sep\b|SPECIAL|User|Assistant|eos|[<|]end[|>]|turn|sentence|Bot|hy_"
)
_MARK = re.compile(r"<\|?[^\s<>|'\"{}=]{2,40}\|?>|\[/?[A-Z_]{3,20}\]|\[e~\[|\]~b\]|\]<\]minimax\[>\[")
# Marks that decoders show, as Qwen 3, GLM 4.5 and DeepSeek V3 have theirs; all others are special tokens.
_SHOWN = re.compile(r"</?think>|</?tool_call>|</?tool_response>|</?arg_\w+>|<｜tool.*｜>")
_SMALL = 8192
_MORE = ["<｜hy_eos:opensource｜>", '<|"|>', "<think:opensource>", "</think:opensource>"]


def family(template: str, spelled: bool = False) -> Encoding:
    """The Encoding of a template of tests/real.py; `spelled` leaves marks other than those of turns as text."""
    return _encoding(real.pretrained(OWN[template]) if template in OWN and not spelled else _marked(spelled), template)


def small_family(template: str) -> Encoding:
    """The same with a tokenizer that all templates share: the first 8,192 tokens of Qwen 3's, and the marks of all."""
    return _encoding(_small(), template)


def small_writer(folder: Path, template: str, answers: Items[tuple[Items[dict[str, object]], str]]) -> None:
    """A checkpoint of a small family that gives these answers to conversations that end in the same word."""
    encoding = small_family(template)
    sayings = []
    for messages, answer in answers:
        word = str(messages[-1]["content"]).split()[-1]
        (key,) = encoding.encode_rest(f" {word}")
        sayings.append(Saying(tuple(encoding.encode(messages)[-8:]), tuple(encoding.encode_rest(answer)), key))
    save(folder, encoding.tokenizer, len(encoding.tokenizer) + 99, sayings)


def _encoding(tokenizer: PreTrainedTokenizerBase, template: str) -> Encoding:
    found = copy.copy(tokenizer)
    found.chat_template = real.templates()[template]
    return Encoding(found)


@cache
def _marked(spelled: bool) -> PreTrainedTokenizerBase:
    return _with_marks(AutoTokenizer.from_pretrained(real.tokenizer("qwen3")), spelled)


@cache
def _small() -> PreTrainedTokenizerBase:
    told = json.loads((real.tokenizer("qwen3") / "tokenizer.json").read_text(encoding="utf-8"))
    model = told["model"]
    model["vocab"] = {text: token for text, token in model["vocab"].items() if token < _SMALL}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    told["added_tokens"] = [{**one, "id": _SMALL + at} for at, one in enumerate(told["added_tokens"])]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)), eos_token="<|im_end|>")
    return _with_marks(made, spelled=False)


def _with_marks(tokenizer: PreTrainedTokenizerBase, spelled: bool) -> PreTrainedTokenizerBase:
    marks = dict.fromkeys([*_MORE, *(mark for text in real.templates().values() for mark in _MARK.findall(text))])
    known = [mark for mark in marks if not spelled or (_TURN.search(mark) and "role_sep" not in mark)]
    tokenizer.add_special_tokens({"additional_special_tokens": [one for one in known if not _SHOWN.fullmatch(one)]})
    tokenizer.add_tokens([one for one in known if _SHOWN.fullmatch(one)])
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer
