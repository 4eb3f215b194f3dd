#!/usr/bin/env bash
# transformers 5.23.0: dequantising fp8 takes a block's height from the shapes, not from weight_block_size: wrong weights
# without an error where the rows are no whole blocks.
#
# 48 rows in blocks of 32 have two rows of scales. Rows 24 to 31 are in the first block and get the scale of the second.
# Where the rows are no multiple of the scales' rows (576 rows in blocks of 128: DeepSeek's kv_a_proj_with_mqa), it raises.
#
# Seen with transformers 5.23.0, accelerate 1.15.0 and torch 2.13.0 on a CPU.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

weight = torch.ones(48, 32).to(torch.float8_e4m3fn)
scales = torch.tensor([[1.0], [2.0]])
dense = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
print(f"row 24, in the first block of 32 rows, is {float(dense[24, 0])} times its codes; the first scale is 1")
assert (dense[24:32] == 2).all()
PY
