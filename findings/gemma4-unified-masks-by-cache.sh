#!/usr/bin/env bash
# transformers 5.23.0: how Gemma 4's unified model attends to an image depends on the kind of cache.
#
# Gemma 4 lets the rows of an image see one another in layers with a window, and leaves full attention causal. The
# unified class (the 12B) has a method that makes these masks, but its forward does not call it: generate() with its
# usual cache lets rows of an image see one another in every layer, even beyond the window, while with
# cache_implementation="static" generate() makes the masks beforehand with that method. Prompt, weights and settings are
# the same, and the logits of the first token differ. The forward of Gemma4ForConditionalGeneration does call it.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, global_head_dim=16, num_global_key_value_heads=1, num_hidden_layers=4, num_kv_shared_layers=0,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            sliding_window=64, use_bidirectional_attention="vision")
config = Gemma4UnifiedConfig(text_config=text, vision_config=dict(mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=16),
                             image_token_id=60, boi_token_id=61, eoi_token_id=62, video_token_id=59, audio_token_id=58)
torch.manual_seed(0)
model = Gemma4UnifiedForConditionalGeneration(config).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(0, 1)
ids = torch.tensor([[2, 5, 61, *[60] * 6, 62, 7, 8]])
seen = dict(pixel_values=torch.rand(1, 6, 6912), mm_token_type_ids=(ids == 60).int(),
            image_position_ids=torch.tensor([[[x, y] for y in range(2) for x in range(3)]]))
first = {}
for images in ({}, seen):
    for cache in ("dynamic", "static"):
        found = model.generate(ids if images else ids[ids < 60][None], **images, max_new_tokens=1, do_sample=False,
                               pad_token_id=0, cache_implementation=cache, disable_compile=True, output_logits=True,
                               return_dict_in_generate=True)
        first[bool(images), cache] = found.logits[0][0]
for images in (False, True):
    apart = (first[images, "dynamic"] - first[images, "static"]).abs().max().item()
    print(f"{'with an image' if images else 'text alone'}: logits differ by up to {apart:.1e} between the two caches")
    assert (apart > 1e-2) == images, "the behaviour has changed"
PY
