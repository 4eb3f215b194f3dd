#!/usr/bin/env bash
# llguidance 1.9.1: a literal that begins like JSON shuts out the JSON that stands beside it as an alternative.
#
# `start: "{\"name\": 1}" | json` with `json: %json {…}` looks as if either could be written. As soon as an answer begins
# with {" it is held to the literal: of {"nought": 1}, which the schema describes, three characters are taken (up to the
# n that both share), then the answer cannot go on. The same literal cut where JSON has its own terminals,
# "{" "\"name\"" ": 1}", leaves both open. One would guess that alternatives of a context-free grammar do not depend on
# how a literal is cut.
#
# Seen with llguidance 1.9.1, transformers 5.23.0, tokenizers 0.23.3.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1 transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytelevel = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytelevel.decoder = decoders.ByteLevel()
bytelevel.add_tokens([AddedToken("<end>", special=True)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytelevel, eos_token="<end>")
reader, answer = from_tokenizer(tokenizer), tokenizer('{"nought": 1}')["input_ids"]
schema = '{"type": "object", "properties": {"nought": {"type": "integer"}}, "additionalProperties": false}'
taken = {}
for literal in (r'"{\"name\": 1}"', r'"{" "\"name\"" ": 1}"', '"other"'):
    grammar = LLMatcher.grammar_from_lark(f"start: {literal} | json\njson: %json {schema}")
    taken[literal] = LLMatcher(reader, grammar, log_level=0).try_consume_tokens(answer)
    print(f"beside {literal:24} {taken[literal]} of {len(answer)} characters of the JSON are taken")
assert list(taken.values()) == [3, len(answer), len(answer)]
PY
