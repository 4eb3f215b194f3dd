"""Number formats as people write them, and torch's."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,  # as the model is stored
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
}
