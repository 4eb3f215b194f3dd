"""Sparse attention: a row attends to those keys that a small indexer scores highest (DeepSeek-V3.2, arXiv 2512.02556).

The key of the index is kept as one more head of a layer's keys, so that whatever moves keys moves it too.
Q query rows   K key rows   H heads   D head size   I heads of the index   F numbers of a row for the index
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specexec.errors import UnsupportedArchitecture
from specexec.model.architecture import Index
from specexec.model.attention import Style, Visibility, attend_block
from specexec.model.cache import LayerKV
from specexec.sizes import INDEX_SCORES, QUERY_BLOCK

Chosen: TypeAlias = list[Tensor | None]
"""For each block of query rows the keys that each attends to, int32 [Q, most]; None where it is all that they see."""


def let_in_indexers(model: nn.Module) -> None:
    """Make sweeps reach the indexers of a model. Harmless when repeated."""
    for attention in _attentions(model):
        if _with_mask not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_with_mask, with_kwargs=True)
        indexer = attention.indexer
        if isinstance(indexer, nn.Module) and "forward" not in vars(indexer):
            vars(indexer)["forward"] = _Telling(indexer)


class _Telling:
    """In the place of an indexer's forward: what it would score with, not what it would choose."""

    def __init__(self, indexer: nn.Module) -> None:
        self._own = indexer.forward

    def __call__(self, *args: Any, past_key_values: object = None, **kwargs: Any) -> Tensor:
        """[1, R, F] in float32: queries of all heads, their weights, and the key."""
        with _Heard() as heard:
            self._own(*args, past_key_values=heard, **kwargs)
        query_1RID, weight_1R1I = heard.factors
        assert heard.key_1RD is not None
        return torch.cat([query_1RID.flatten(2), weight_1R1I.flatten(2), heard.key_1RD.float()], dim=2)


class _Heard(TorchFunctionMode):
    """Takes the place of a cache for one call of an indexer, and notes what it multiplies with keys and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []
        self.key_1RD: Tensor | None = None

    def update_indexer(self, key_1RD: Tensor, _: int) -> Tensor:
        """One key is enough: no score is wanted here."""
        self.key_1RD = key_1RD
        return key_1RD[:, :1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul:
            self.factors.append(args[0])
        return func(*args, **(kwargs or {}))


def _with_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Their attention takes a mask apart before it hands it on; visibility comes with the rows."""
    if kwargs.get("sweep") is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "attention_mask": hidden.new_ones(1, 1, hidden.shape[1], 1, dtype=torch.bool)}


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        inner = getattr(module, "inner", None)  # streamed layers hide theirs
        for one in inner.modules() if isinstance(inner, nn.Module) else [module]:
            if "indexer" in one._modules or getattr(one, "skip_topk", False):
                yield one


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
    """The keys that the nodes `rows` attend to: those of the highest sum over heads of weight * relu(query @ key)."""
    I, D = index.heads, index.width
    query_QID, weight_QI = index_QF[:, : I * D].unflatten(1, (I, D)), index_QF[:, I * D : I * D + I]
    found: Chosen = []
    for queries, here, end in _blocks(sees, rows):
        if end <= index.most:
            found.append(None)
            continue
        key_KD = kv.keys_HRD[-1, :end, :D].float()
        width = max(1, INDEX_SCORES // ((queries.stop - queries.start) * I))
        score_QK = torch.cat(
            [
                torch.einsum("qi,qik->qk", weight_QI[here], torch.relu(query_QID[here] @ part_KD.T))
                for part_KD in key_KD.split(width)
            ],
            dim=1,
        )
        hidden_QK = sees.hidden(queries, 0, end, style)
        if hidden_QK is not None:
            score_QK.masked_fill_(hidden_QK, -torch.inf)
        found.append(score_QK.topk(index.most, dim=1).indices.int())
    return found


def attend_chosen(
    query_HQD: Tensor, kv: LayerKV, sees: Visibility, rows: slice, style: Style, chosen: Items[Tensor | None]
) -> Tensor:
    """Attention of the nodes `rows` to keys that were chosen, [H, Q, D of values]; `kv` holds no keys of an index."""
    blocks = []
    for (queries, here, end), keys_QT in zip(_blocks(sees, rows), chosen, strict=True):
        hidden_QK = sees.hidden(queries, 0, end, style)
        if keys_QT is not None:
            others_QK = torch.ones(queries.stop - queries.start, end, dtype=torch.bool, device=keys_QT.device)
            others_QK.scatter_(1, keys_QT.long(), False)
            hidden_QK = others_QK if hidden_QK is None else others_QK | hidden_QK
        blocks.append(
            attend_block(
                query_HQD[:, here],
                kv.keys_HRD,
                kv.values_HRD,
                range(end),
                lambda first, last, hidden_QK=hidden_QK: None if hidden_QK is None else hidden_QK[:, first:last],  # type: ignore[misc]
                style,
            )
        )
    return torch.cat(blocks, dim=1)


def _blocks(sees: Visibility, rows: slice) -> Iterator[tuple[slice, slice, int]]:
    """Nodes a block of queries at a time, the same as a part of `rows`, and the end of the keys that they see."""
    for start in range(rows.start, rows.stop, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, rows.stop))
        yield queries, slice(start - rows.start, queries.stop - rows.start), sees.committed + queries.stop
