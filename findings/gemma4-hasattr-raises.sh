#!/usr/bin/env bash
# transformers 5.23.0: hasattr(config, "head_dim") raises on a Gemma 4 text config, and to_dict() tells another size.
#
# Full-attention layers have heads of another size than sliding ones, and the config is guarded against being asked for
# "the" size: the attribute access raises AmbiguousGlobalPerLayerAttributeError, a RuntimeError and no AttributeError.
# So hasattr() and getattr(config, "head_dim", None), the usual way to write code for many families, raise too, while
# to_dict() (what config.json says) gives 256 without a word of the layers that have 512. The sizes per layer are in
# config.per_layer_config[i].head_dim.
#
# Seen with transformers 5.23.0.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
from transformers import Gemma4TextConfig

config = Gemma4TextConfig()
try:
    answer = repr(hasattr(config, "head_dim"))
except Exception as problem:
    answer = f"{type(problem).__name__}, a {type(problem).__mro__[1].__name__}"
    assert not isinstance(problem, AttributeError) and isinstance(problem, RuntimeError)
sizes = {kind: layer.head_dim for kind, layer in zip(config.layer_types, config.per_layer_config)}
print(f"hasattr(config, 'head_dim'): {answer}; to_dict(): {config.to_dict()['head_dim']}; by layer type: {sizes}")
assert answer.startswith("Ambiguous")
assert config.to_dict()["head_dim"] == 256 and sizes == {"sliding_attention": 256, "full_attention": 512}
PY
