"""A tokenizer that went through a GGUF header gives the tokens of the tokenizer.json that it was made from."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from offload.checkpoint.gguf.header import GgufHeader, Value
from offload.checkpoint.gguf.tokenizer import (
    BYTE,
    CONTROL,
    KINDS,
    MERGES,
    MOST_LETTERS,
    NORMAL,
    SCORES,
    SPACE,
    TOKENS,
    UNKNOWN,
    USER_DEFINED,
    tokenizer_documents,
)
from offload.errors import CorruptShard
from tests import real

# By family: ggml's architecture and kind of tokenizer, and the rule by which text is cut.
FAMILIES = {
    "llama2": ("llama", "llama", "default"),
    "mistral_nemo": ("llama", "gpt2", "tekken"),
    "llama3_1": ("llama", "gpt2", "llama-bpe"),
    "qwen3": ("qwen3", "gpt2", "qwen2"),
    "gptoss": ("gpt-oss", "gpt2", "gpt-4o"),
    "deepseek_v3": ("deepseek2", "gpt2", "deepseek-v3"),
    "gemma3": ("gemma3", "llama", "default"),
}
# Each takes seconds: one is tried always, all with SPECEXEC_ALL_TOKENIZERS=1.
TRIED = FAMILIES if os.environ.get("SPECEXEC_ALL_TOKENIZERS") else ("deepseek_v3",)
TEXTS = (
    "Hello world, it's 2024! You'LL see: don't   stop.",
    "  two blanks first,\ttabs\t\tand\n\n\nlines \r\n end ",
    "def f(x_1):\n        return x_1**2 + 1234567.89 # ünï “quotes” … ©",
    "日本語と中文，한국어 и русский текст العربية 𝒜𝓁𝓁 👩‍👩‍👧 🇫🇷 e\u0301",
    "camelCaseHTTPServer /usr/bin/x86_64 $100 50% a.b.c@d.e https://a.b/c?d=e&f=g#h",
    "",
    " ",
)


def header_of(family: str) -> GgufHeader:
    """The metadata that llama.cpp's converter writes for a tokenizer.json."""
    architecture, model, pre = FAMILIES[family]
    told = json.loads((real.tokenizer(family) / "tokenizer.json").read_text())
    added = {one["id"]: one for one in told["added_tokens"]}
    tokens = {index: token for token, index in told["model"]["vocab"].items()}
    tokens |= {index: one["content"] for index, one in added.items()}
    kinds: dict[int, int] = {}
    for index, token in tokens.items():
        kinds[index] = NORMAL
        if index in added:
            kinds[index] = CONTROL if added[index]["special"] else USER_DEFINED
        elif model == "llama" and len(token) == 6 and token.startswith("<0x"):
            kinds[index] = BYTE
        if token == "<unk>":
            kinds[index] = UNKNOWN
    order = range(len(tokens))
    assert sorted(tokens) == [*order]
    words = [tokens[index].replace(SPACE, " ") if kinds[index] == USER_DEFINED else tokens[index] for index in order]
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        TOKENS: words,
        KINDS: [kinds[index] for index in order],
    }
    if model == "gpt2":
        metadata[MERGES] = [one if isinstance(one, str) else " ".join(one) for one in told["model"]["merges"]]
    else:
        # As SentencePiece has them: the better, the earlier a token is merged (runs of blanks come last).
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(told["model"]["merges"]):
            ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
        metadata[SCORES] = [-float(ranks.get(tokens[index], 0)) for index in order]
        metadata["tokenizer.ggml.add_space_prefix"] = family == "llama2"
        metadata["tokenizer.ggml.unknown_token_id"] = next(index for index in order if tokens[index] == "<unk>")
        metadata["tokenizer.ggml.bos_token_id"] = next(index for index in order if tokens[index] in ("<s>", "<bos>"))
    return GgufHeader(Path("x.gguf"), 0, metadata, ())


@pytest.mark.parametrize("family", TRIED)
def test_a_rebuilt_tokenizer_gives_the_tokens_of_the_original(family: str) -> None:
    rebuilt = Tokenizer.from_str(json.dumps(tokenizer_documents(header_of(family))["tokenizer.json"]))
    original = Tokenizer.from_file(str(real.tokenizer(family) / "tokenizer.json"))
    specials = [token.content for token in original.get_added_tokens_decoder().values() if token.special][:3]
    for text in (*TEXTS, f"a{specials[0]}b {specials[-1]} c"):
        theirs = original.encode(text, add_special_tokens=False)
        ours = rebuilt.encode(text, add_special_tokens=False)
        assert ours.ids == theirs.ids, text
        assert rebuilt.decode(ours.ids) == original.decode(theirs.ids)


def test_pieces_that_would_take_for_ever_to_take_apart_are_refused_by_name() -> None:
    for tokens, says in (
        (["a", "a" * (MOST_LETTERS + 1)], f"{TOKENS} has a piece of {MOST_LETTERS + 1} letters"),
        (["a" * index for index in range(1, MOST_LETTERS)], f"{TOKENS} has more than 6136 pairs"),
    ):
        metadata: dict[str, Value] = {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            TOKENS: tokens,
            SCORES: [0.0] * len(tokens),
        }
        with pytest.raises(CorruptShard, match=says):
            tokenizer_documents(GgufHeader(Path("x.gguf"), 0, metadata, ()))
