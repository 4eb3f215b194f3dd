"""Attention to a window and to compressed keys: every so many tokens become one more key (DeepSeek-V4, section 2.3).

The token that closes a block of them brings its key, which it and its descendants see: so a compressed key is kept in
the row of that token, in the place of values, since these layers take each key as its value. Whatever moves rows moves
it too. Projections of tokens whose block is still open are kept as inputs of a convolution are (`recurrent/`).
Q query rows   K key rows   E compressed keys   T tokens of a block   H heads   D head size   I heads of the index
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specexec.model.architecture import Compression, Index
from specexec.model.attention import Style, Visibility, attend_block
from specexec.model.cache import LayerKV
from specexec.model.indexed import columns, highest, query_blocks, scores
from specexec.model.module_types import every_module
from specexec.model.recurrent.packed import BLOCKS, INDEX_BLOCKS, PackedStates
from specexec.model.recurrent.seams import sweep_here
from specexec.sizes import SUMMED


def let_in_compressors(model: nn.Module) -> set[int]:
    """Make sweeps reach the compressors of a model; the numbers of their layers. Harmless when repeated."""
    found = set()
    for attention in every_module(model):
        compressor = attention._modules.get("compressor")
        if compressor is not None and hasattr(attention, "layer_idx"):
            if "forward" not in vars(compressor):
                vars(compressor)["forward"] = _Handing(compressor)
            found.add(int(attention.layer_idx))  # type: ignore[arg-type]  # nn.Module declares every attribute a Tensor
    return found


class _Handing:
    """In the place of a compressor's forward: what rows compress to, and would be scored with, as further keys."""

    def __init__(self, compressor: nn.Module) -> None:
        self._own = compressor.forward

    def __call__(self, hidden_1RH: Tensor, q_1RL: Tensor, position_1R: Tensor, cache: object, layer: int) -> Any:
        """[1, 1, rows * …, D], each row's numbers filled up with zeros to a multiple of D; and no mask."""
        states = sweep_here()
        if states is None:
            return self._own(hidden_1RH, q_1RL, position_1R, cache, layer)
        compressor: Any = self._own.__self__  # type: ignore[attr-defined]  # a bound method
        handed = [_compressed(compressor, hidden_1RH, position_1R[0], states, layer, BLOCKS)]
        if indexer := compressor._modules.get("indexer"):
            rotated = indexer.rotary_emb(hidden_1RH, position_ids=position_1R, layer_type=indexer.rope_layer_type)
            query_1IRD = indexer.q_b_proj(q_1RL).unflatten(2, (-1, indexer.head_dim)).transpose(1, 2)
            query_1IRD = _rotate(indexer)(query_1IRD, *rotated)
            handed.append(query_1IRD[0].transpose(0, 1).flatten(1))
            handed.append(indexer.scorer.weights_proj(hidden_1RH)[0])
            handed.append(_compressed(indexer, hidden_1RH, position_1R[0], states, layer, INDEX_BLOCKS))
        rows_RF = torch.cat(handed, dim=1)
        filled_RF = nn.functional.pad(rows_RF, (0, -rows_RF.shape[1] % compressor.head_dim))
        return filled_RF.reshape(1, 1, -1, compressor.head_dim), None


def _compressed(
    module: Any, hidden_1RH: Tensor, position_R: Tensor, states: PackedStates, layer: int, name: str
) -> Tensor:
    """The key that each row closes, [R, D]; zeros for a row that closes none.

    The sum over its block of softmax(gate + bias) * projection, normed and rotated to the block's first position. Where
    a token has two series of both, the first counts for the next block, which then spans twice as many tokens.
    """
    inputs_RC = torch.cat([module.kv_proj(hidden_1RH)[0], module.gate_proj(hidden_1RH)[0]], dim=1)
    T, D, bias_TC = module.compress_rate, module.head_dim, module.position_bias
    series = bias_TC.shape[1] // D
    closed_RD = inputs_RC.new_zeros(len(inputs_RC), D)
    closing_E, inputs_EKC = states.met(layer, name, inputs_RC, series * T, (position_R + 1) % T == 0)
    if not len(closing_E):
        return closed_RD
    values_EKC, gates_EKC = inputs_EKC.chunk(2, dim=2)
    gates_EKC = gates_EKC + bias_TC.repeat(series, 1)
    if series == 2:
        values_EKC, gates_EKC = (
            torch.cat([both_EKC[:, :T, :D], both_EKC[:, T:, D:]], dim=1) for both_EKC in (values_EKC, gates_EKC)
        )
        first_E11 = (position_R[closing_E] < T)[:, None, None]  # nothing is before the first block
        gates_EKC = torch.cat([gates_EKC[:, :T].masked_fill(first_E11, -torch.inf), gates_EKC[:, T:]], dim=1)
    weights_EKD = gates_EKC.softmax(dim=1, dtype=torch.float32).to(values_EKC.dtype)
    key_1ED = module.kv_norm((values_EKC * weights_EKD).sum(dim=1)).unsqueeze(0)
    first_1E = (position_R[closing_E] + 1 - T).unsqueeze(0)
    rotated = module.rotary_emb(key_1ED, position_ids=first_1E, layer_type=module.rope_layer_type)
    closed_RD[closing_E] = _rotate(module)(key_1ED.unsqueeze(1), *rotated)[0, 0]
    return closed_RD


def _rotate(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__].apply_rotary_pos_emb


def taken_apart(key_1KD: Tensor, rows: int, compression: Compression) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values as a cache keeps them, and what rows are scored with: from keys with what was handed on.

    The keys are those of the rows and, with an index, the index's; the values are the keys that the rows close.
    """
    own_1RD, handed_RF = key_1KD[:, :rows], key_1KD[0, rows:].reshape(rows, -1)
    D, index = own_1RD.shape[2], compression.index
    closed_1RD = handed_RF[:, :D].unsqueeze(0)
    if index is None:
        return own_1RD, closed_1RD, None
    scored, end = D + index.heads * (index.width + 1), D + index.heads * (index.width + 1) + index.width
    extra_1RD = nn.functional.pad(handed_RF[:, scored:end], (0, D - index.width)).unsqueeze(0)
    return torch.cat([own_1RD, extra_1RD]), closed_1RD, handed_RF[:, D:scored]


def attend_compressed(
    query_HQD: Tensor,
    kv: LayerKV,
    sees: Visibility,
    rows: slice,
    style: Style,
    compression: Compression,
    index_QF: Tensor | None,
) -> Tensor:
    """Attention of the nodes `rows` to their window and to compressed keys, all or those an index chooses: [H, Q, D].

    Compressed keys come first, filled up to whole sums of attention, then rows from the start of such a sum on.
    """
    blocks, near = [], replace(style, window=compression.window)
    for queries, here, end in query_blocks(sees, rows):
        closing_E = ((sees.positions(0, end) + 1) % compression.tokens == 0).nonzero().squeeze(1)
        start = sees.first_visible(queries, near) // SUMMED * SUMMED
        room = -(-len(closing_E) // SUMMED) * SUMMED
        size = queries.stop - queries.start, room + end - start
        hidden_QK = torch.ones(size, dtype=torch.bool, device=kv.keys_HRD.device)
        unseen_QK = sees.hidden(queries, 0, end, style)
        unseen_QE = hidden_QK[:, : len(closing_E)]
        unseen_QE[:] = False if unseen_QK is None else unseen_QK[:, closing_E]
        if index_QF is not None and compression.index and len(closing_E) > compression.index.most:
            key_ED = style.kept.plain(kv.keys_HRD[1:2, closing_E])[0].float()
            unseen_QE |= _others(index_QF[here], key_ED, unseen_QE, compression.index)
        far_QK = sees.hidden(queries, start, end, near)
        hidden_QK[:, room:] = False if far_QK is None else far_QK
        closed_1ED = kv.values_HRD[:1, closing_E]
        filling_1ED = closed_1ED.new_zeros(1, room - len(closing_E), closed_1ED.shape[2])
        key_1KD = torch.cat([closed_1ED, filling_1ED, kv.keys_HRD[:1, start:end]], dim=1)
        seen = range(key_1KD.shape[1])
        blocks.append(attend_block(query_HQD[:, here], key_1KD, key_1KD, seen, partial(columns, hidden_QK), style))
    return torch.cat(blocks, dim=1)


def _others(index_QF: Tensor, key_ED: Tensor, unseen_QE: Tensor, index: Index) -> Tensor:
    """True for the keys that are not among those of the highest scores."""
    query_QF, weight_QI = index_QF.float().split([index.heads * index.width, index.heads], dim=1)
    query_QID = query_QF.unflatten(1, (index.heads, index.width))
    score_QE = scores(query_QID, weight_QI, key_ED[:, : index.width]).masked_fill_(unseen_QE, -torch.inf)
    return ~highest(score_QE, index.most)
