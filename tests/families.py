"""Real chat templates with tokenizers in which the marks they write are tokens, as in the tokenizers of their models.

We have seven real tokenizers for 119 templates: where a template's own is not among them, Qwen 3's stands in, to which
the marks are added.
"""

from __future__ import annotations

import copy
import re
from functools import cache

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specexec.text.tokenizer import Encoding
from tests import real

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
_MORE = ["<｜hy_eos:opensource｜>", '<|"|>', "<think:opensource>", "</think:opensource>"]


def family(template: str, spelled: bool = False, own: bool = True) -> Encoding:
    """The Encoding of a template of tests/real.py; `spelled` leaves marks other than those of turns as text.

    Without `own` all share one tokenizer, in which the marks of all are tokens.
    """
    found = copy.copy(_own(OWN[template]) if template in OWN and own and not spelled else _marked(spelled))
    found.chat_template = real.templates()[template]
    return Encoding(found)


@cache
def _own(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(real.tokenizer(name))


@cache
def _marked(spelled: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(real.tokenizer("qwen3"))
    marks = dict.fromkeys([*_MORE, *(mark for text in real.templates().values() for mark in _MARK.findall(text))])
    known = [mark for mark in marks if not spelled or (_TURN.search(mark) and "role_sep" not in mark)]
    tokenizer.add_special_tokens({"additional_special_tokens": [one for one in known if not _SHOWN.fullmatch(one)]})
    tokenizer.add_tokens([one for one in known if _SHOWN.fullmatch(one)])
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer
