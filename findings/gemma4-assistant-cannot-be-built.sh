#!/usr/bin/env bash
# transformers 5.23.0: Gemma4AssistantForCausalLM cannot be made of any config whose layers share all their keys.
#
# An assistant has no keys and values of its own: every layer reads those of its target, so that its text config says
# num_kv_shared_layers = num_hidden_layers. The text model asks its config which layers own what the others share, finds
# none, and raises a ValueError about kinds of layers. One would guess that the class whose only use is such a config
# accepts it.
#
# Seen with transformers 5.23.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

text = Gemma4TextConfig(
    num_hidden_layers=6, num_kv_shared_layers=6, hidden_size=64, intermediate_size=64, vocab_size=256,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
)
try:
    Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text))
    said = "made"
except Exception as problem:
    said = f"{type(problem).__name__}: {str(problem)[:90]}"
print(said)
assert said.startswith("ValueError"), said
PY
