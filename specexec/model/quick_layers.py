"""Decoder layers of a model that only guesses, in few operations: what Llama and its relatives compute, in own steps.

transformers' own layers round after every step, which a target must do too; nothing depends on a drafter's bits. Layers
of other families stay as they are.   R rows   H heads of queries and keys   D head size
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from specexec.model.attention import LayerRows, PackedRows, Style
from specexec.model.module_types import every_module

# Layers of transformers that compute x + attention(norm(x)), and of that x + mlp(norm(x)), with one way to rotate.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = tuple(f"transformers.models.{name}.modeling_{name}.{name.capitalize()}DecoderLayer" for name in FAMILIES)


class Norm(Protocol):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    weight: Tensor
    variance_epsilon: float


class Attention(Protocol):
    """What the layer reads of its attention; the norms of queries and keys are there in Qwen3."""

    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Norm
    k_norm: Norm


class Mlp(Protocol):
    """down(act(gate(x)) * up(x))."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module


class QuickLayer(nn.Module):
    """A layer of one of these families; its parts are those that transformers made."""

    self_attn: Attention
    mlp: Mlp
    input_layernorm: Norm
    post_attention_layernorm: Norm

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], sweep: PackedRows, **_: object
    ) -> Tensor:
        """Hidden states [1, R, hidden size] behind the layer, of those before it."""
        x_RI = hidden_states[0]
        x_RI = x_RI + self._attended(normed(x_RI, self.input_layernorm), *position_embeddings, sweep)
        in_RI, mlp = normed(x_RI, self.post_attention_layernorm), self.mlp
        return (x_RI + mlp.down_proj(mlp.act_fn(mlp.gate_proj(in_RI)).mul_(mlp.up_proj(in_RI)))).unsqueeze(0)

    def _attended(self, in_RI: Tensor, cos_1RD: Tensor, sin_1RD: Tensor, sweep: PackedRows) -> Tensor:
        attn, shape = self.self_attn, (len(in_RI), -1, self.self_attn.head_dim)
        query_RHD, key_RHD = attn.q_proj(in_RI).view(shape), attn.k_proj(in_RI).view(shape)
        if self._heads_normed:
            query_RHD, key_RHD = normed(query_RHD, attn.q_norm), normed(key_RHD, attn.k_norm)
        both_RHD = rotated(torch.cat([query_RHD, key_RHD], 1), cos_1RD[0], sin_1RD[0])
        query_HRD, key_HRD = both_RHD.transpose(0, 1).split([query_RHD.shape[1], key_RHD.shape[1]])
        value_HRD = attn.v_proj(in_RI).view(shape).transpose(0, 1)
        rows = LayerRows(attn.layer_idx, query_HRD, key_HRD, value_HRD, self._style)
        mixed_RI: Tensor = attn.o_proj(sweep.attend(rows).flatten(1))
        return mixed_RI

    @cached_property
    def _heads_normed(self) -> bool:
        return hasattr(self.self_attn, "q_norm")

    @cached_property
    def _style(self) -> Style:
        return Style(self.self_attn.scaling)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x / rms(x) * weight, rounded once."""
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def rotated(x_RHD: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
    """Each pair (i, i + D/2) of numbers turned by its angle (Su et al. 2021, arXiv 2104.09864, in NeoX's order)."""
    half = x_RHD.shape[-1] // 2
    sin_R1D = torch.cat([-sin_RD[:, :half], sin_RD[:, half:]], 1).unsqueeze(1)
    return (x_RHD * cos_RD.unsqueeze(1)).addcmul_(x_RHD.roll(half, -1), sin_R1D)


def quicken(model: nn.Module) -> None:
    """Let the layers of a model that only guesses compute so, where their family is one of these; others stay."""
    for module in every_module(model):
        if f"{type(module).__module__}.{type(module).__qualname__}" in CLASSES:
            module.__class__ = QuickLayer
