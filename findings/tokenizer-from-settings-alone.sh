#!/usr/bin/env bash
# transformers 5.23.0: a folder without any vocabulary gives a Llama tokenizer of three tokens that encodes text to [].
#
# The folder holds config.json and a tokenizer_config.json that names LlamaTokenizer, and neither tokenizer.json nor
# tokenizer.model: what is left of a download that broke off. AutoTokenizer.from_pretrained raises nothing; the
# tokenizer knows <unk>, <s> and </s>, and every text becomes an empty list.
#
# Seen with transformers 5.23.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q transformers==5.23.0
venv/bin/python - 2>/dev/null <<'PY'
from pathlib import Path

from transformers import AutoTokenizer

Path("model").mkdir()
Path("model/config.json").write_text('{"model_type": "llama"}')
Path("model/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
tokenizer = AutoTokenizer.from_pretrained("model")
ids = tokenizer.encode("The quick brown fox.", add_special_tokens=False)
print(f"{type(tokenizer).__name__} of {len(tokenizer)} tokens {sorted(tokenizer.get_vocab())}; a sentence becomes {ids}")
assert len(tokenizer) == 3 and ids == []
PY
