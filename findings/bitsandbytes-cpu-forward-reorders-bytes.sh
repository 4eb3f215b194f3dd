#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU: after one forward pass a Linear4bit's bytes dequantise to noise, without an error.
#
# On CPUs with avx512_bf16 the first inference of a Linear4bit layer rearranges its packed weight in place for a
# faster kernel. The layer itself stays right, but dequantize_4bit(layer.weight.data, layer.weight.quant_state), the
# documented way to get the weight back, then reads the new order as the old one: before the pass it is within the
# rounding of NF4 (relative error 0.09), after it unrelated to the weight (1.4). Nothing is raised; the shape of
# weight.data has changed. state_dict() gives the original order again, so a saved and reloaded layer dequantises well.
#
# Seen with bitsandbytes 0.50.2 and torch 2.13.0. On CPUs without avx512_bf16 nothing is rearranged and nothing shown.
set -euo pipefail
grep -qw avx512_bf16 /proc/cpuinfo || { echo "this processor has no avx512_bf16: the behaviour cannot be seen here"; exit 0; }
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy bitsandbytes==0.50.2
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit

torch.manual_seed(0)
weight = torch.randn(256, 256, dtype=torch.bfloat16)
layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
layer = layer.to("cpu").eval()
rows = torch.randn(4, 256, dtype=torch.bfloat16)


def off(found, right):
    return float((found.float() - right.float()).norm() / right.float().norm())


def dequantised(layer):
    return off(dequantize_4bit(layer.weight.data, layer.weight.quant_state), weight)


before = dequantised(layer)
with torch.no_grad():
    product = off(layer(rows), rows.float() @ weight.float().T)
after = dequantised(layer)
print(f"relative error of the dequantised weight: before a forward pass {before:.2f}, after it {after:.2f}; "
      f"of the layer's own product {product:.2f}")
assert before < 0.15 and product < 0.15 and after > 1
PY
