#!/usr/bin/env bash
# transformers 5.23.0: generate(use_mtp=True) finds the layer for multi-token prediction of a GLM-4 MoE by the literal
# numbers 46 and 92, those of the two published sizes, not by num_hidden_layers of config.json.
#
# A checkpoint of another depth that names its tensors by the same rule (model.layers.{num_hidden_layers}.…) and says
# num_nextn_predict_layers: 1 is refused: "weights are missing". With the same number given to the model's private list
# it drafts. A pruned or a small model of the family is met by this.
#
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - "$folder/model" 2>/dev/null <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig
from transformers.modeling_layers import MtpModel

folder = sys.argv[1]
config = Glm4MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, num_nextn_predict_layers=1, eos_token_id=None, pad_token_id=0,
)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
tensors = load_file(f"{folder}/model.safetensors")
tensors |= {
    name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name
}
tensors |= {f"model.layers.2.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
tensors["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})

model = AutoModelForCausalLM.from_pretrained(folder)
print("looked for behind", model._keys_to_ignore_on_load_unexpected)
try:
    MtpModel.from_pretrained(model)
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0][:120])
else:
    raise SystemExit("the layer was found")
model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
MtpModel.from_pretrained(model)
print("found with its own number in that list")
PY
