#!/usr/bin/env bash
# transformers 5.23.0: Nemotron-H computes one thing when it reads many tokens and another when it writes them.
#
# Its Mamba-2 layers hold the size of a step (dt) at `time_step_min`, 0.001 in published configs, in a pass over several
# tokens; the path for a single token with a cache has no such limit. So where a step is smaller than the limit, what
# generate() writes is not the argmax of one forward pass over what it wrote, and a text that is read again (a second
# turn, a verified draft) has other states than when it was written. With time_step_min near 0 both agree.
#
# Seen with transformers 5.23.0 and torch 2.13.0 on a CPU, without the packages mamba_ssm and causal_conv1d.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

IDS = torch.arange(3, 23)[None]


def difference(least: float) -> float:
    """The largest difference of a logit between one pass over 20 tokens and 8 tokens followed by 12 single ones."""
    torch.manual_seed(1)
    config = NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1,
        chunk_size=16, initializer_range=0.3, time_step_min=least,
    )
    model = NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mixer.dt_bias.fill_(-9.0)  # small steps, as training may find them
        whole = model(IDS).logits[0]
        past, off = model(IDS[:, :8], use_cache=True).past_key_values, 0.0
        for at in range(8, IDS.shape[1]):
            place = torch.tensor([[at]])
            step = model(IDS[:, at : at + 1], past_key_values=past, use_cache=True, position_ids=place).logits[0, -1]
            off = max(off, float((step - whole[at]).abs().max()))
    return off


published, none = difference(0.001), difference(1e-6)
print(f"time_step_min 0.001: single steps are off by up to {published:.1e}; 1e-6: {none:.1e}")
assert published > 1e-3 and none < 1e-4
PY
