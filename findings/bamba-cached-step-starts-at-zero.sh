#!/usr/bin/env bash
# transformers 5.23.0: a step of Bamba with a cache and no position_ids rotates its queries as if it were position 0.
#
# For Llama and its kind, model(ids, past_key_values=cache) continues where the cache ends: positions are counted from
# the cache's length. Bamba (Mamba-2 layers with some attention) counts them from zero again at every call, so the last
# token's logits after a cached prefix differ from those of one pass over everything; no warning is given. With
# position_ids they agree to float32 rounding. generate() always passes them and is right.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

small = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, initializer_range=0.3)
mamba = dict(attn_layer_indices=[0, 1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
off = {}
for name, make in (("llama", lambda: LlamaForCausalLM(LlamaConfig(**small))),
                   ("bamba", lambda: BambaForCausalLM(BambaConfig(**small, **{**mamba, "attn_layer_indices": [1]})))):
    torch.manual_seed(0)
    model, ids = make().eval(), torch.arange(3, 15)[None]
    with torch.no_grad():
        whole = model(ids).logits[0, -1]
        for told in (False, True):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            where = {"position_ids": torch.tensor([[11]])} if told else {}
            step = model(ids[:, -1:], past_key_values=cache, use_cache=True, **where).logits[0, -1]
            off[name, told] = float((step - whole).abs().max())
            print(f"{name}: cached step, position_ids {'given' if told else 'left out'}: "
                  f"largest difference of a logit {off[name, told]:.1e}")
assert off["llama", False] < 1e-4 and off["bamba", True] < 1e-4
assert off["bamba", False] > 1e-2
PY
