"""DFlash (z-lab): a small model that fills a block of masks behind the text in one pass. Knows no tree and no file.

    c_i = hidden_norm(fc [x_{l+1}[i] for l in target_layer_ids])       for every token that the target has processed
    block: E[t_n], then B-1 times E[mask], at the positions n … n+B-1; each layer attends to keys and values of every c
    and of the whole block (layers with a window: of what lies before); out_k guesses token n+k, or the one after it

Keys and values of c alone are kept. DFlash-2 has short convolutions around attention and MLP as well; what it and
DSpark know of the tokens in between is in following.py.
R rows   H hidden size   A heads   D width of a head   B block   K taps of a convolution   G its groups
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from specexec.drafters.heads.dflash_fields import MARKOV, ONLY_TRAINING, SELECTOR, DFlashFields
from specexec.drafters.heads.filled import TargetSizes, fill, ids_of
from specexec.drafters.heads.following import Following, Markov, Selector
from specexec.drafters.heads.refusal import unread
from specexec.errors import BadDrafter
from specexec.model.attention import positions_of
from specexec.model.cache import KVCache, LayerKV


class DFlash(nn.Module):
    """The head's own layers; embeddings and head are the target's. Hashed by identity: caches are kept per head."""

    def __init__(self, fields: DFlashFields, config: Qwen3Config, hidden: int, embeddings_VH: Tensor) -> None:
        super().__init__()
        self.fields, self.context, eps = fields, int(config.max_position_embeddings), config.rms_norm_eps
        self.fc = nn.Linear(len(fields.taps) * hidden, config.hidden_size, bias=False)
        self.hidden_norm, self.norm = (Qwen3RMSNorm(config.hidden_size, eps) for _ in range(2))
        kinds = config.layer_types or ()
        self.layers = nn.ModuleList(_Layer(fields, config, kind == "sliding_attention") for kind in kinds)
        self._rotary = Qwen3RotaryEmbedding(config)
        self._table = [embeddings_VH]  # no parameter of its own

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
        """Hidden states [B, H] of the block behind a text that ends in `last`; the cache holds the rest of it."""
        ids_B = torch.tensor([last, *[self.fields.mask] * (self.fields.block - 1)], device=self._table[0].device)
        x_BH = embedding(ids_B, self._table[0]).to(self.fc.weight) * self.fields.scale
        turned, text = self._turned(x_BH, cache.position), _Text(cache.rows, cache.dropped)
        for number, layer in enumerate(self.layers):
            x_BH = layer(x_BH, cache.layers[number], text, turned)
        out_BH: Tensor = self.norm(x_BH)
        return out_BH

    def shaped(self, logits_PS: Tensor) -> Tensor:
        """Logits as the head means them."""
        logits_PS, softcap = logits_PS * self.fields.multiplier, self.fields.softcap
        return logits_PS if softcap is None else (logits_PS / softcap).tanh() * softcap

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
    def __init__(self, fields: DFlashFields, config: Qwen3Config, slides: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(fields, config, slides), Qwen3MLP(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = (Qwen3RMSNorm(hidden, eps) for _ in range(2))
        if fields.kernel:
            self.attention_conv, self.mlp_conv = (Convolution(hidden, fields.kernel, fields.group) for _ in range(2))

    def forward(self, x_BH: Tensor, kv: LayerKV, text: _Text, turned: tuple[Tensor, Tensor]) -> Tensor:
        attention = partial(self.self_attn, kv=kv, text=text, turned=turned)
        x_BH = x_BH + self._around("attention_conv", attention, self.input_layernorm(x_BH))
        return x_BH + self._around("mlp_conv", self.mlp, self.post_attention_layernorm(x_BH))

    def _around(self, name: str, inner: Callable[[Tensor], Tensor], x_BH: Tensor) -> Tensor:
        convolution = self._modules.get(name)
        return inner(x_BH) if convolution is None else convolution(x_BH, inner)


class Convolution(nn.Module):
    """Mixes neighbours in a block, before and after something: out[t] = sum_k (base[k] + own[t, k, group]) x[t - k]."""

    def __init__(self, hidden: int, taps: int, group: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.empty(2, taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * taps * (hidden // group), bias=False)

    def forward(self, x_BH: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """What `inner` makes of the mixed rows, mixed again; both by what the rows were at first."""
        taps = self.base_kernel.shape[1]
        before_BKG, after_BKG = self.kernel_projection(x_BH).view(len(x_BH), 2, taps, -1).unbind(1)
        return self._mixed(inner(self._mixed(x_BH, self.base_kernel[0], before_BKG)), self.base_kernel[1], after_BKG)

    def _mixed(self, x_BH: Tensor, base_KH: Tensor, own_BKG: Tensor) -> Tensor:
        rows, hidden = x_BH.shape
        weights_BKH = base_KH + own_BKG.repeat_interleave(hidden // own_BKG.shape[-1], -1)
        earlier = [pad(x_BH, (0, 0, back, 0))[:rows] for back in range(len(base_KH))]
        return (weights_BKH * torch.stack(earlier, 1)).sum(1)


class _Attention(nn.Module):
    def __init__(self, fields: DFlashFields, config: Qwen3Config, slides: bool) -> None:
        super().__init__()
        self._width = int(config.head_dim)
        self._window, self._of_block = config.sliding_window if slides else None, fields.window_of_block
        self._causal = slides if fields.causal is None else fields.causal
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
        if self._window is None:
            return sees_BR
        if self._of_block:
            return sees_BR & (at[text.rows] - at <= self._window)
        return sees_BR & (back_BR.abs() < self._window)

    def _split(self, rows_R: Tensor) -> Tensor:
        return rows_R.view(len(rows_R), -1, self._width).transpose(0, 1)


def _turn(rows_ARD: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
    found, _ = apply_rotary_pos_emb(rows_ARD[None], rows_ARD[None], *turned)
    return cast("Tensor", found)[0]


@dataclass(frozen=True)
class BlockHead:
    """A head that is loaded: what fills a block, what knows the token before, and a smaller vocabulary with its ids."""

    dflash: DFlash
    following: Following | None = None
    out: nn.Linear | None = None
    ids: list[int] | None = None


class _Whole(nn.Module):
    """All parts of a head under the names in which they are published."""

    def __init__(self, dflash: DFlash, following: Markov | Selector | None, out: nn.Linear | None) -> None:
        super().__init__()
        for name, module in dflash.named_children():
            self.add_module(name, module)
        if out is not None:
            self.lm_head = out
        if following is not None:
            self.add_module((SELECTOR if isinstance(following, Selector) else MARKOV).rstrip("."), following)


def loaded(settings: Mapping[str, object], tensors: Mapping[str, Tensor], target: TargetSizes, name: str) -> BlockHead:
    """The head for this target. Raises BadDrafter, by name, where it has other parts than these or other shapes."""
    fields, own = DFlashFields.of(settings, [*tensors], name), _own(tensors, len(target.embeddings_VH))
    refused = partial(unread, fields.kind, name)
    vocabulary = len(target.embeddings_VH)
    if not 0 <= fields.mask < vocabulary:
        raise refused(f"its mask_token_id is {fields.mask}, the target has {vocabulary} tokens")
    try:
        config = Qwen3Config.from_dict(dict(fields.layer))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise refused(f"its config.json makes no sense ({error})") from error
    d2t_S, t2d_V = own.pop("d2t", None), own.pop("t2d", None)
    ids = None if d2t_S is None else ids_of(d2t_S, t2d_V, vocabulary, refused)
    rows = vocabulary if ids is None else len(ids)
    with torch.device("meta"):
        head = DFlash(fields, config, target.hidden, target.embeddings_VH)
        following = _following(fields, own, vocabulary, rows, int(config.hidden_size), refused)
        out = nn.Linear(config.hidden_size, rows, bias=False) if "lm_head.weight" in own else None
        if (out is None) != (ids is None):
            raise refused("it names some of its target's tokens and has no lm_head of its own, or no d2t")
        whole = _Whole(head, following, out)
    head._rotary = Qwen3RotaryEmbedding(config)
    whole._modules.pop("_rotary")
    fill(whole, own, target, refused)
    head._rotary.to(target.device)
    return BlockHead(head.eval(), following, out, ids)


def _own(tensors: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """Those that guess, by their names here. What repeats the target's embeddings, or its whole head, is not needed."""
    own = {
        key.removeprefix("model.").replace("_codebook.weight", "_codebook"): one
        for key, one in tensors.items()
        if not key.removeprefix("model.").startswith((*ONLY_TRAINING, "embed_tokens."))
    }
    if len(own.get("lm_head.weight", ())) == vocabulary:
        for key in ("lm_head.weight", "d2t", "t2d"):
            own.pop(key, None)
    return own


def _following(
    fields: DFlashFields,
    own: Mapping[str, Tensor],
    vocabulary: int,
    named: int,
    hidden: int,
    refused: Callable[[str], BadDrafter],
) -> Markov | Selector | None:
    """The part that knows the token before, without weights."""
    if fields.kind == "DFlash":
        return None
    table = own.get(f"{SELECTOR}predecessor_codebook", own.get(f"{MARKOV}markov_w1.weight"))
    if table is None or table.dim() != 2:
        raise refused("the table of its sequential part is missing")
    rank = int(table.shape[1])
    if fields.kind == "DSpark":
        return Markov(fields.markov, vocabulary, named, hidden, rank)
    if named != vocabulary:
        raise refused("its selector compares some of its target's tokens only")
    return Selector(vocabulary, hidden, rank, fields.best)
