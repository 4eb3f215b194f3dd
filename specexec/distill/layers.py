"""What heads in training have in common: their layers' shape, their first weights, what they share with a target.

H hidden size   V vocabulary   D tokens that a head names   K rows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from specexec.distill.recording import RecordedTarget


def layer_settings(
    target: RecordedTarget, model_type: Literal["llama", "qwen3"] = "llama", layers: int = 1
) -> dict[str, object]:
    """config.json of a model of a head's layers, as wide as the target whatever that is made of."""
    width = 128 if target.hidden >= 2048 else min(64, target.hidden // 2)
    heads = max(target.hidden // width, 1)
    shared = next(one for one in (4, 3, 2, 1) if heads % one == 0)
    own = {"mlp_bias": False} if model_type == "llama" else {"layer_types": ["full_attention"] * layers}
    return own | {
        "model_type": model_type, "hidden_size": target.hidden,
        "intermediate_size": -(-target.hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // shared,
        "head_dim": width, "vocab_size": target.vocabulary, "max_position_embeddings": target.context,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip


@dataclass(frozen=True)
class SharedWithTarget:
    """The target's embeddings [V, H]; rows of its head [D, H] for the tokens that a head names, and the head's row of
    each token, int64 [V], -1 for none; its last norm [H], where it was recorded."""

    embeddings_VH: Tensor
    out_DH: Tensor
    place_V: Tensor
    norm_H: Tensor | None

    @classmethod
    def of(cls, shared: Mapping[str, Tensor], ids: Tensor) -> SharedWithTarget:
        """Of what was recorded, for the tokens `ids` (int64 [D], ascending)."""
        embeddings_VH = shared["embed_tokens.weight"]
        place_V = torch.full((len(embeddings_VH),), -1)
        place_V[ids] = torch.arange(len(ids))
        rows_VH = shared.get("lm_head.weight", embeddings_VH)
        return cls(embeddings_VH, rows_VH[ids].float(), place_V, shared.get("norm.weight"))

    def on(self, device: torch.device) -> SharedWithTarget:
        """The same there."""
        norm_H = None if self.norm_H is None else self.norm_H.to(device)
        moved = (one.to(device) for one in (self.embeddings_VH, self.out_DH, self.place_V))
        return replace(self, **dict(zip(("embeddings_VH", "out_DH", "place_V"), moved, strict=True)), norm_H=norm_H)

    @property
    def names(self) -> int:
        """Tokens that are named."""
        return len(self.out_DH)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.embeddings_VH.nbytes + self.out_DH.nbytes


def draw(module: nn.Module, seed: int) -> None:
    """First weights of a module that was made without memory: norms of 1, matrices that keep sizes."""
    module.to_empty(device="cpu").float()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in module.parameters():
            one.fill_(1.0) if one.dim() == 1 else one.normal_(0.0, one.shape[1] ** -0.5, generator=drawn)


def reciprocal_size(states_KF: Tensor) -> Tensor:
    """One over how large each number is in these rows, [F], each row scaled to a mean square of 1."""
    states_KF = states_KF.float()
    normed_KF = states_KF * states_KF.square().mean(-1, keepdim=True).rsqrt()
    return normed_KF.square().mean(0).sqrt().clamp(min=1e-3).reciprocal()
