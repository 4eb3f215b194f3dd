#!/usr/bin/env bash
# transformers 5.23.0: encoder_repetition_penalty works on models that have no encoder.
#
# Its name, and its use as "penalty on sequences that are not in the encoder's input", say that a decoder-only model has
# nothing for it to work on. `generate` gives the processor the whole prompt instead: every token id that the prompt holds
# is made likelier by that factor, at every step. A generation_config.json copied from a translation model so changes
# what a Llama writes, where a reader of the name would expect it to be ignored or refused.
#
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **small))
prompt = torch.tensor([[5, 6, 7, 8]])
changed = {}
for penalty in (1.0, 5.0):
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, pad_token_id=0,
        encoder_repetition_penalty=penalty, output_logits=True, output_scores=True, return_dict_in_generate=True,
    )
    changed[penalty] = [(a != b).nonzero()[:, 1].tolist() for a, b in zip(out.scores, out.logits)]
    print(f"is_encoder_decoder {model.config.is_encoder_decoder}, penalty {penalty}: logits changed {changed[penalty]}")
assert changed == {1.0: [[], []], 5.0: [[5, 6, 7, 8]] * 2}
PY
