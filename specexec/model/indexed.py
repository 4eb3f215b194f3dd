"""Sparse attention: a row attends to those keys that a small indexer scores highest (DeepSeek-V3.2, arXiv 2512.02556).

MiniMax M3 chooses blocks of keys: the score of a block is that of its best key, and each head of the index chooses for
its share of the layer's heads.

The key of the index is kept as one more head of a layer's keys, so that whatever moves keys moves it too. A row has the
same scores whatever rows and keys are there beside it, and of equal ones the first is chosen: in a tree as without one.
Q query rows   K key rows   H heads   D head size   I heads of the index   F numbers of a row for the index
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specexec.errors import UnsupportedArchitecture
from specexec.model.architecture import Index
from specexec.model.attention import FILLED, Style, Visibility, attend_block
from specexec.model.cache import LayerKV
from specexec.model.module_types import every_module
from specexec.sizes import INDEX_SCORES, KEY_BLOCK, QUERY_BLOCK

Chosen: TypeAlias = list[Tensor | None]
"""For each block of query rows the keys that each attends to, int32 [1, Q, most]; None where it is all that they see.

Of an index that chooses blocks of keys: these, int32 [I, Q, most], -1 where there are no more.
"""


def let_in_indexers(model: nn.Module) -> None:
    """Make sweeps reach the indexers of a model. Harmless when repeated."""
    for attention in _attentions(model):
        indexer = attention.indexer
        of_blocks = hasattr(indexer, "topk_blocks")
        if not of_blocks and _with_mask not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_with_mask, with_kwargs=True)
        if isinstance(indexer, nn.Module) and "forward" not in vars(indexer):
            vars(indexer)["forward"] = _Telling(indexer, 1 if of_blocks else 2)


class _Telling:
    """In the place of an indexer's forward: what it would score with, not what it would choose."""

    def __init__(self, indexer: nn.Module, products: int) -> None:
        self._own, self._products = indexer.forward, products

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """[1, R, F] in float32: queries of all heads, weights of heads if it has any, and the key."""
        heard = _Heard(self._products)
        with suppress(_Enough), heard:
            self._own(*args, **({**kwargs, "past_key_values": heard} if "past_key_values" in kwargs else kwargs))
        if self._products == 1:
            ((query_1IRD, key_11DR),) = heard.products
            return torch.cat([query_1IRD.transpose(1, 2).flatten(2), key_11DR[0].transpose(1, 2)], dim=2)
        (query_1RID, _), (weight_1R1I, _) = heard.products
        assert heard.key_1RD is not None
        return torch.cat([query_1RID.flatten(2), weight_1R1I.flatten(2), heard.key_1RD.float()], dim=2)


class _Enough(Exception):
    """All that was wanted of an indexer is known."""


class _Heard(TorchFunctionMode):
    """Takes the place of a cache for one call of an indexer, and notes the factors of its first products."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self._wanted = wanted
        self.products: list[tuple[Tensor, Tensor]] = []
        self.key_1RD: Tensor | None = None

    def update_indexer(self, key_1RD: Tensor, _: int) -> Tensor:
        """One key is enough: no score is wanted here."""
        self.key_1RD = key_1RD
        return key_1RD[:, :1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul:
            self.products.append((args[0], args[1]))
            if len(self.products) == self._wanted:
                raise _Enough
        return func(*args, **(kwargs or {}))


def _with_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Their attention takes a mask apart before it hands it on; visibility comes with the rows."""
    if kwargs.get("sweep") is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "attention_mask": hidden.new_ones(1, 1, hidden.shape[1], 1, dtype=torch.bool)}


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in every_module(model):
        if "indexer" in module._modules or getattr(module, "skip_topk", False):
            yield module


def with_index_key(key_HRD: Tensor, value_HRD: Tensor, index_RF: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Keys and values of new rows with one more head, which holds their keys of the index."""
    _, R, D = key_HRD.shape
    if index.width > D:
        raise UnsupportedArchitecture(f"keys of an index of {index.width} numbers do not fit into heads of {D}.")
    extra_1RD = key_HRD.new_zeros(1, R, D)
    extra_1RD[0, :, : index.width] = index_RF[:, -index.width :]
    return torch.cat([key_HRD, extra_1RD]), torch.cat([value_HRD, value_HRD.new_zeros(1, R, value_HRD.shape[2])])


def without_index_key(kv: LayerKV) -> LayerKV:
    """The keys and values that are attended to."""
    return LayerKV(kv.keys_HRD[:-1], kv.values_HRD[:-1])


def choose(index_QF: Tensor, kv: LayerKV, sees: Visibility, rows: slice, index: Index, style: Style) -> Chosen:
    """What the nodes `rows` attend to: the keys of the highest sum over heads of weight * relu(query @ key).

    Or for each head the blocks of keys in which the highest query @ key is highest.
    """
    I, D = index.heads, index.width
    query_QID, weight_QI = index_QF[:, : I * D].unflatten(1, (I, D)), index_QF[:, I * D : I * D + I]
    found: Chosen = []
    for queries, here, end in query_blocks(sees, rows):
        if end <= index.most * (index.block or 1):
            found.append(None)
            continue
        key_KD, hidden_QK = _index_keys(kv, end, D, style), sees.hidden(queries, 0, end, style)
        if index.block:
            found.append(_best_blocks(query_QID[here], key_KD, hidden_QK, sees, queries, index))
            continue
        score_QK = scores(query_QID[here], weight_QI[here], key_KD)
        if hidden_QK is not None:
            score_QK.masked_fill_(hidden_QK, -torch.inf)
        found.append(_places(highest(score_QK, index.most), index.most).unsqueeze(0))
    return found


def scores(query_QID: Tensor, weight_QI: Tensor, key_KD: Tensor) -> Tensor:
    """Of each key the sum over heads of weight * relu(query @ key), [Q, K]; some keys at a time."""
    query_RD = query_QID.flatten(0, 1)
    most = max(INDEX_SCORES // len(query_RD), FILLED)
    parts = []
    for own_KD in key_KD.split(most):
        single_QIK = _products(query_RD, own_KD).unflatten(0, weight_QI.shape).relu_().mul_(weight_QI.unsqueeze(2))
        sum_QK = single_QIK[:, 0].clone()
        for head_QK in single_QIK.unbind(1)[1:]:  # one after the other: a product would sum them in any order
            sum_QK += head_QK
        parts.append(sum_QK)
    return torch.cat(parts, dim=1)


def _products(query_RD: Tensor, key_KD: Tensor) -> Tensor:
    """Of each row with each key, [R, K]; as in attention of no fewer rows and keys than sums have one order for."""
    R, K = len(query_RD), len(key_KD)
    query_RD = query_RD.repeat(-(-FILLED // R), 1) if R < FILLED else query_RD
    key_KD = nn.functional.pad(key_KD, (0, 0, 0, FILLED - K)) if K < FILLED else key_KD
    return (query_RD @ key_KD.T)[:R, :K]


def highest(score: Tensor, most: int) -> Tensor:
    """True for so many highest scores [..., K] of each row; of those that are equal to the lowest of them the first."""
    edge = score.topk(most, dim=-1).values[..., -1:]
    above, equal = score > edge, score == edge
    room = most - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > room).any()):
        equal &= equal.cumsum(-1, dtype=torch.int32) <= room
    return above | equal


def _places(chosen: Tensor, most: int) -> Tensor:
    """Where it is true, int32 [..., most]; each row has so many."""
    return chosen.nonzero()[:, -1].int().view(*chosen.shape[:-1], most)


def _index_keys(kv: LayerKV, end: int, D: int, style: Style) -> Tensor:
    """The keys of the index that the rows 0 … end - 1 have, [K, D] in float32."""
    key_KD = torch.empty(end, D, device=kv.keys_HRD.device)
    for rows in (slice(first, min(first + KEY_BLOCK, end)) for first in range(0, end, KEY_BLOCK)):
        key_KD[rows] = style.kept.plain(kv.keys_HRD[-1:, rows])[0, :, :D]
    return key_KD


def _best_blocks(
    query_QID: Tensor, key_KD: Tensor, hidden_QK: Tensor | None, sees: Visibility, queries: slice, index: Index
) -> Tensor:
    """Blocks of positions for each head and query, [I, Q, most]."""
    block_K = sees.positions(0, len(key_KD)) // index.block
    score_IQK = _products(query_QID.transpose(0, 1).flatten(0, 1), key_KD).view(index.heads, -1, len(key_KD))
    if hidden_QK is not None:
        score_IQK.masked_fill_(hidden_QK, -torch.inf)
    I, Q, _ = score_IQK.shape
    best_IQB = score_IQK.new_full((I, Q, int(block_K.max()) + 1), -torch.inf)
    best_IQB.scatter_reduce_(2, block_K.expand_as(score_IQK), score_IQK, "amax")
    own_Q1 = (sees.position_R[queries] // index.block).unsqueeze(1)
    local_QL = (own_Q1 - torch.arange(index.local, device=own_Q1.device)).clamp(min=0)
    best_IQB.scatter_(2, local_QL.expand(I, -1, -1), torch.inf)
    most = min(index.most, best_IQB.shape[2])
    found_IQT = _places(highest(best_IQB, most), most)
    return found_IQT.masked_fill(best_IQB.gather(2, found_IQT.long()) == -torch.inf, -1)


def attend_chosen(
    query_HQD: Tensor, kv: LayerKV, sees: Visibility, rows: slice, style: Style, index: Index, chosen: Chosen
) -> Tensor:
    """Attention of the nodes `rows` to keys that were chosen, [H, Q, D of values]; `kv` holds no keys of an index."""
    blocks = []
    for (queries, here, end), chosen_IQT in zip(query_blocks(sees, rows), chosen, strict=True):
        hidden_QK = sees.hidden(queries, 0, end, style)
        others = [None] if chosen_IQT is None else [_others(own_QT, sees, end, index) for own_QT in chosen_IQT]
        H, kept, shares = len(query_HQD), len(kv.keys_HRD), len(others)
        mixed = []
        for share, others_QK in enumerate(others):
            unseen_QK = hidden_QK if others_QK is None else others_QK if hidden_QK is None else others_QK | hidden_QK
            heads = slice(share * H // shares, (share + 1) * H // shares)
            keys = slice(share * kept // shares, max((share + 1) * kept // shares, share * kept // shares + 1))
            mixed.append(
                attend_block(
                    query_HQD[heads, here],
                    kv.keys_HRD[keys],
                    kv.values_HRD[keys],
                    range(end),
                    partial(columns, unseen_QK),
                    style,
                )
            )
        blocks.append(torch.cat(mixed))
    return torch.cat(blocks, dim=1)


def _others(chosen_QT: Tensor, sees: Visibility, end: int, index: Index) -> Tensor:
    """True for the keys that were not chosen, [Q, K]."""
    wanted_QT = chosen_QT.long()
    if not index.block:
        others_QK = torch.ones(len(wanted_QT), end, dtype=torch.bool, device=wanted_QT.device)
        return others_QK.scatter_(1, wanted_QT, False)
    block_K = sees.positions(0, end) // index.block
    others_QB = torch.ones(len(wanted_QT), int(block_K.max()) + 2, dtype=torch.bool, device=wanted_QT.device)
    others_QB.scatter_(1, wanted_QT + 1, False)  # the first column is for those that are no block
    return others_QB[:, 1:][:, block_K]


def columns(hidden_QK: Tensor | None, first: int, last: int) -> Tensor | None:
    """Those of some keys."""
    return None if hidden_QK is None else hidden_QK[:, first:last]


def query_blocks(sees: Visibility, rows: slice) -> Iterator[tuple[slice, slice, int]]:
    """Nodes a block of queries at a time, the same as a part of `rows`, and the end of the keys that they see."""
    for start in range(rows.start, rows.stop, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, rows.stop))
        yield queries, slice(start - rows.start, queries.stop - rows.start), sees.committed + queries.stop
