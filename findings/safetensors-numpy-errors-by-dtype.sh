#!/usr/bin/env bash
# safetensors 0.8.0: what `safetensors.numpy.load_file` raises for a sound file depends on its dtype, and is not its own.
#
# A file of BF16 tensors ends in TypeError ("data type 'bfloat16' not understood"), one of F8 or F4 tensors in
# AttributeError ("module 'numpy' has no attribute 'float8_e4m3fn'"). Neither is SafetensorError, so a reader that
# expects the library's own error for files it cannot use is ended by a file that is in order. All of these dtypes are
# written by `safetensors.torch.save_file` of the same release.
#
# Seen with safetensors 0.8.0, numpy 2, torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 "numpy>=2,<3" safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file

seen = {}
for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2):
    save_file({"x": torch.zeros(8, dtype=torch.uint8).view(dtype)}, "x.safetensors")
    try:
        seen[dtype] = str(load_file("x.safetensors")["x"].dtype)
    except Exception as error:
        seen[dtype] = f"{type(error).__name__}, SafetensorError: {isinstance(error, SafetensorError)}"
    print(dtype, "->", seen[dtype])
refused = "AttributeError, SafetensorError: False"
assert list(seen.values()) == ["float16", "TypeError, SafetensorError: False", refused, refused, refused]
PY
