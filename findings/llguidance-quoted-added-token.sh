#!/usr/bin/env bash
# llguidance 1.9.1: a Lark grammar that quotes an added token's text offers that token and then refuses it.
#
# A tokenizer has the added token "<call>" (special or not). For the grammar `start: "<call>" /[a-z]+/` the mask of
# allowed tokens holds exactly one id, the added token's; the same matcher then does not accept it ("forced bytes:
# got '<'"). No other token is allowed, so an answer can never begin. The unquoted token form <call> works. One would
# guess that quoting either spells the text out in ordinary tokens or takes the token, and that a mask never offers
# what the parser refuses.
#
# Seen with llguidance 1.9.1, transformers 5.23.0, tokenizers 0.23.3.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1 transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

for special in (False, True):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytelevel = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytelevel.decoder = decoders.ByteLevel()
    bytelevel.add_tokens([AddedToken("<call>", special=special, normalized=False), AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytelevel, eos_token="<end>")
    call = tokenizer.convert_tokens_to_ids("<call>")
    for form, accepted in (('"<call>"', False), ("<call>", True)):
        matcher = LLMatcher(from_tokenizer(tokenizer), LLMatcher.grammar_from_lark(f"start: {form} /[a-z]+/"), log_level=0)
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        offered = tokenizer.convert_ids_to_tokens(np.flatnonzero(mask).tolist())
        took = matcher.consume_tokens([call])
        print(f"special {special!s:5}  start: {form:8}  mask offers {offered}  then accepts it: {took}")
        assert offered == ["<call>"] and took is accepted
PY
