#!/usr/bin/env bash
# transformers 5.23.0: top_h=1.0 is not off, it keeps the best 100 tokens.
#
# GenerationConfig takes top_h in (0, 1]; like top_p, 1.0 would be guessed to let every token through. The processor
# looks at the 100 most likely tokens only, whatever top_h is, and forbids all others.
#
# Seen with transformers 5.23.0 and torch 2.13.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import TopHLogitsWarper, TopPLogitsWarper

logits = torch.zeros(1, 1000)
left = {}
for name, warper in (("top_p", TopPLogitsWarper(1.0)), ("top_h", TopHLogitsWarper(1.0))):
    left[name] = int(warper(torch.tensor([[0]]), logits.clone()).isfinite().sum())
    print(f"{name}=1.0 leaves {left[name]} of 1000 equally likely tokens")
assert left == {"top_p": 1000, "top_h": 100}
PY
