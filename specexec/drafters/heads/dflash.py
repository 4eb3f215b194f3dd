"""DFlash (z-lab): a small model that fills a block of masks behind the text in one pass. Knows no tree and no file.

    c_i = hidden_norm(fc [x_{l+1}[i] for l in target_layer_ids])       for every token that the target has processed
    block: E[t_n], then B-1 times E[mask], at the positions n … n+B-1; each layer attends to keys and values of every c
    and of the whole block (layers with a window: of what lies before); out_k, k = 1 … B-1, guesses token n+k

Keys and values of c alone are kept. R rows   H hidden size   A heads   D width of a head   B block   V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from specexec.drafters.heads.filled import TargetSizes, fill
from specexec.drafters.heads.refusal import unread
from specexec.model.attention import positions_of
from specexec.model.cache import KVCache, LayerKV

KIND = "DFlash"


@dataclass(frozen=True)
class DFlashFields:
    """What a DFlash folder says of its head. `taps`: x_j of the target, in the order in which fc reads them.

    Embeddings are multiplied by `scale`, logits by `multiplier` and then held within `softcap`, if there is one.
    """

    config: Qwen3Config
    block: int
    mask: int
    taps: tuple[int, ...]
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, object], name: str) -> DFlashFields:
        """Raises BadDrafter, by name, for what is missing or not understood."""
        refused = partial(unread, KIND, name)
        given = settings.get("dflash_config")
        own = {**settings, **(given if isinstance(given, dict) else {})}
        block, mask, ids = (own.get(key) for key in ("block_size", "mask_token_id", "target_layer_ids"))
        if not isinstance(block, int) or not isinstance(mask, int) or not isinstance(ids, list) or block < 2:
            raise refused("its config.json lacks block_size, mask_token_id or target_layer_ids")
        if settings.get("model_type") != "qwen3" or own.get("sample_from_anchor"):
            raise refused(f"a {settings.get('model_type')!r} that samples from its anchor or has other layers")
        try:
            scale, multiplier = (
                float(cast("float", own.get(key) or 1.0)) for key in ("input_embedding_scale", "output_multiplier")
            )
            softcap = float(cast("float", own.get("final_logit_softcapping") or 0.0)) or None
            config = Qwen3Config.from_dict(dict(settings))
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise refused(f"its config.json makes no sense ({error})") from error
        if not ids or any(type(one) is not int or one < 0 for one in ids):
            raise refused(f"its target_layer_ids are {ids}")
        return cls(config, block, mask, tuple(one + 1 for one in ids), scale, multiplier, softcap)

    def shaped(self, logits_PV: Tensor) -> Tensor:
        """Logits as the head means them."""
        logits_PV = logits_PV * self.multiplier
        return logits_PV if self.softcap is None else (logits_PV / self.softcap).tanh() * self.softcap


class DFlash(nn.Module):
    """The head's own layers; embeddings and head are the target's. Hashed by identity: caches are kept per head."""

    def __init__(self, fields: DFlashFields, hidden: int, embeddings_VH: Tensor) -> None:
        super().__init__()
        config, self.fields = fields.config, fields
        eps = config.rms_norm_eps
        self.fc = nn.Linear(len(fields.taps) * hidden, config.hidden_size, bias=False)
        self.hidden_norm, self.norm = (Qwen3RMSNorm(config.hidden_size, eps) for _ in range(2))
        self.layers = nn.ModuleList(_Layer(config, kind) for kind in config.layer_types or ())
        self._rotary = Qwen3RotaryEmbedding(config)
        self._table = [embeddings_VH]  # no parameter of its own

    @property
    def context(self) -> int:
        """Positions it was made for."""
        return int(self.fields.config.max_position_embeddings)

    @torch.no_grad()
    def read(self, cache: KVCache, tokens: list[int], states_RF: Tensor) -> None:
        """Keep keys and values of these next tokens of a text, of the target's states at the taps side by side."""
        c_RH = self.hidden_norm(self.fc(states_RF.to(self.fc.weight)))
        turned = self._turned(c_RH, cache.position)
        cache.node_tokens.extend(tokens)
        cache.parents.extend(range(-1, len(tokens) - 1))
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            cache.write(number, 0, *layer.self_attn.keys_and_values(c_RH, turned))
        cache.commit(range(len(tokens)))

    @torch.no_grad()
    def fill(self, cache: KVCache, last: int) -> Tensor:
        """Hidden states [B - 1, H] of the masks behind a text that ends in `last`; the cache holds the rest of it."""
        ids_B = torch.tensor([last, *[self.fields.mask] * (self.fields.block - 1)], device=self._table[0].device)
        x_BH = embedding(ids_B, self._table[0]).to(self.fc.weight) * self.fields.scale
        turned, text = self._turned(x_BH, cache.position), _Text(cache.rows, cache.dropped)
        for number, layer in enumerate(self.layers):
            x_BH = layer(x_BH, cache.layers[number], text, turned)
        out_BH: Tensor = self.norm(x_BH)
        return out_BH[1:]

    def _turned(self, rows_RH: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions from `first` on."""
        positions = torch.arange(first, first + len(rows_RH), device=rows_RH.device)[None]
        cos, sin = self._rotary(rows_RH[None], positions)
        return cos, sin


class _Text(NamedTuple):
    """The rows of a text, and how many more it had."""

    rows: int
    dropped: int


class _Layer(nn.Module):
    def __init__(self, config: Qwen3Config, kind: str) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(config, kind), Qwen3MLP(config)
        eps = config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = (Qwen3RMSNorm(config.hidden_size, eps) for _ in range(2))

    def forward(self, x_BH: Tensor, kv: LayerKV, text: _Text, turned: tuple[Tensor, Tensor]) -> Tensor:
        x_BH = x_BH + self.self_attn(self.input_layernorm(x_BH), kv, text, turned)
        found_BH: Tensor = x_BH + self.mlp(self.post_attention_layernorm(x_BH))
        return found_BH


class _Attention(nn.Module):
    def __init__(self, config: Qwen3Config, kind: str) -> None:
        super().__init__()
        self._width = int(config.head_dim)
        slides = kind == "sliding_attention"
        causal = getattr(config, "is_causal", None)
        self._window = config.sliding_window if slides else None
        self._causal = slides if causal is None else bool(causal)
        queries, keys = (
            config.num_attention_heads * self._width,
            (config.num_key_value_heads or config.num_attention_heads) * self._width,
        )
        bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(config.hidden_size, queries, bias)
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, keys, bias) for _ in range(2))
        self.o_proj = nn.Linear(queries, config.hidden_size, bias)
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self._width, config.rms_norm_eps) for _ in range(2))

    def keys_and_values(self, rows_RH: Tensor, turned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[A, R, D] each."""
        key_ARD = self.k_norm(self._split(self.k_proj(rows_RH)))
        return _turn(key_ARD, turned), self._split(self.v_proj(rows_RH))

    def forward(self, y_BH: Tensor, kv: LayerKV, text: _Text, turned: tuple[Tensor, Tensor]) -> Tensor:
        query_ABD = _turn(self.q_norm(self._split(self.q_proj(y_BH))), turned)
        key_ABD, value_ABD = self.keys_and_values(y_BH, turned)
        keys, values = (
            torch.cat([old[:, : text.rows], new], 1)[None]
            for old, new in ((kv.keys_HRD, key_ABD), (kv.values_HRD, value_ABD))
        )
        sees_BR = self._sees(len(y_BH), text, y_BH.device)
        mixed_ABD = scaled_dot_product_attention(query_ABD[None], keys, values, sees_BR, enable_gqa=True)[0]
        found_BH: Tensor = self.o_proj(mixed_ABD.transpose(0, 1).flatten(1))
        return found_BH

    def _sees(self, block: int, text: _Text, device: torch.device) -> Tensor | None:
        """Which rows of the text and of the block a row of the block attends to, [B, R]; None: all of them."""
        if self._window is None and not self._causal:
            return None
        at = positions_of(torch.arange(text.rows + block, device=device), text.dropped)
        back_BR = at[text.rows :, None] - at
        sees_BR = back_BR >= 0 if self._causal else torch.ones_like(back_BR, dtype=torch.bool)
        return sees_BR if self._window is None else sees_BR & (back_BR.abs() < self._window)

    def _split(self, rows_R: Tensor) -> Tensor:
        return rows_R.view(len(rows_R), -1, self._width).transpose(0, 1)


def _turn(rows_ARD: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
    found, _ = apply_rotary_pos_emb(rows_ARD[None], rows_ARD[None], *turned)
    return cast("Tensor", found)[0]


def loaded(settings: Mapping[str, object], tensors: Mapping[str, Tensor], target: TargetSizes, name: str) -> DFlash:
    """The head for this target. Raises BadDrafter, by name, where it has other parts than these or other shapes."""
    refused = partial(unread, KIND, name)
    fields = DFlashFields.of(settings, name)
    if not 0 <= fields.mask < len(target.embeddings_VH):
        raise refused(f"its mask_token_id is {fields.mask}, the target has {len(target.embeddings_VH)} tokens")
    with torch.device("meta"):
        head = DFlash(fields, target.hidden, target.embeddings_VH)
    head._rotary = Qwen3RotaryEmbedding(fields.config)
    fill(head, {one.removeprefix("model."): tensor for one, tensor in tensors.items()}, target, refused)
    return head.to(target.device)
