#!/usr/bin/env bash
# transformers 5.23.0: Cohere2VisionForConditionalGeneration does not scale its logits as its language model does.
#
# Cohere2ForCausalLM multiplies logits by config.logit_scale (0.0625 in the published Command models). The wrapper for
# images has the same language model and the same config below text_config, but its own head, without that factor. So for
# one prompt of text the same weights give logits that are 16 times as large: the most likely token is the same, but at
# temperature 1 the wrapper samples as the text model would at 0.0625. Nothing is said.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy pillow transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import Cohere2ForCausalLM, Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

torch.manual_seed(0)
config = Cohere2VisionConfig(
    text_config=dict(model_type="cohere2", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, logit_scale=0.0625, tie_word_embeddings=True),
    vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                       num_attention_heads=2, image_size=28, patch_size=14),
    image_token_id=63,
)
whole = Cohere2VisionForConditionalGeneration(config).eval()
alone = Cohere2ForCausalLM(config.text_config).eval()
alone.model.load_state_dict(whole.model.language_model.state_dict())
alone.lm_head.weight = whole.lm_head.weight
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    theirs, text = whole(input_ids=ids).logits, alone(input_ids=ids).logits
ratio = (theirs / text)[..., 1:].median().item()  # row 0 is padding: zeros
print(f"logits of the wrapper over those of its language model alone: {ratio:.2f}")
assert abs(ratio - 16) < 1e-3 and torch.equal(theirs.argmax(-1), text.argmax(-1))
PY
