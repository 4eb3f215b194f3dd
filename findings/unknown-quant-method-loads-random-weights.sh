#!/usr/bin/env bash
# transformers 5.23.0: a quant_method it does not know is skipped and the model loads with random weights; a missing
# quant_method is an error.
#
# The checkpoint has the shape of an EXL3 one: "trellis", "suh" and "svh" tensors in place of the linear weights, and
# "quant_method": "exl3" in config.json. from_pretrained logs that it skips the quantisation, then fills every linear
# weight at random (two loads give two models) and returns. One would guess an error, as without quant_method.
#
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

small = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(small).save_pretrained("model")
tensors = {}
for name, tensor in load_file("model/model.safetensors").items():
    if name.endswith("_proj.weight"):
        stem = name.removesuffix("weight")
        tensors[stem + "trellis"] = torch.zeros(2, 2, 64, dtype=torch.int16)
        tensors[stem + "suh"] = torch.ones(tensor.shape[1], dtype=torch.float16)
        tensors[stem + "svh"] = torch.ones(tensor.shape[0], dtype=torch.float16)
    else:
        tensors[name] = tensor
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
config = json.loads(Path("model/config.json").read_text())


def load(**quantisation):
    Path("model/config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return AutoModelForCausalLM.from_pretrained("model").model.layers[0].self_attn.q_proj.weight


first, second = load(quant_method="exl3", bits=4.0), load(quant_method="exl3", bits=4.0)
print(f"quant_method exl3: loads; the same weights twice: {torch.equal(first, second)}; they vary by {float(first.std()):.3f}")
assert not torch.equal(first, second)
try:
    load(bits=4.0)
except ValueError as problem:
    print(f"no quant_method: ValueError: {str(problem)[:70]} ...")
else:
    raise AssertionError("a config without quant_method loads now")
PY
