#!/usr/bin/env bash
# transformers 5.23.0: HqqConfig ships, checks its arguments and is documented, and no model can be loaded with it.
#
# Weights in HQQ's few bits were made and loaded through from_pretrained(quantization_config=HqqConfig(...)). In 5.23.0
# the class, its quantizer and the entry of QuantizationMethod are still there; loading a model raises
# NotImplementedError, with the package hqq installed or not, while the same call with another method's config
# (QuantoConfig is asked here for its own missing package) gets as far as what that method needs.
#
# Seen with transformers 5.23.0, hqq 0.2.8.post1, torch 2.13.0 on a CPU.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0 accelerate hqq==0.2.8.post1
cd "$folder" && "$folder/venv/bin/python" - 2>/dev/null <<'PY'
from transformers import AutoModelForCausalLM, HqqConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig

small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**small)).save_pretrained("m")


def outcome(**options):
    try:
        AutoModelForCausalLM.from_pretrained("m", **options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "loaded"


found = {"hqq": outcome(quantization_config=HqqConfig(nbits=4, group_size=64)),
         "quanto": outcome(quantization_config=QuantoConfig(weights="int4"))}
for name, said in found.items():
    print(f"{name}: {said}")
assert found["hqq"].startswith("NotImplementedError"), found
assert not found["quanto"].startswith("NotImplementedError"), found
PY
