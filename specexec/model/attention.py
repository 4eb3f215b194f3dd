"""Attention over packed rows: every row sees the committed text of its own sequence and its own ancestors.

Registered once with transformers under the name `specexec`, it serves every architecture that goes through
`AttentionInterface`; window, soft-cap, sinks and scale arrive as arguments. No Q x K mask is stored: what a row sees
follows from depth-first intervals and positions, block by block, merged by log-sum-exp (Milakov and Gimelshein 2018;
FlashAttention, Dao et al. 2022). Sums run in float32, so that the order of blocks hardly shows in reduced precision.
B texts   H query heads   G = H / heads of keys   Q query rows   K key rows   D head size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specexec.errors import UnsupportedArchitecture
from specexec.model.kept_rows import WHOLE, KeptRows
from specexec.model.module_types import every_module
from specexec.sizes import AT_ONCE, KEY_BLOCK, QUERY_BLOCK, SINKS, SUMMED

NAME = "specexec"
LOWEST = torch.finfo(torch.float32).min
# MKL's products sum in another order for few rows or columns than for more, and from some 400 inputs on (from 193 on a
# CPU with AVX2 alone) in one that depends on how many there are. So no block has fewer queries or keys, no sum more
# keys, and keys are counted from the first of the text.
FILLED = 16
KEPT = 1 << 15  # bytes of a mask that is kept for the next layers: of a block far from full


@dataclass(frozen=True)
class Style:
    """What a layer asks of its attention beyond queries, keys and values."""

    scale: float
    window: int | None = None  # a row sees the `window` last positions, its own included
    chunk: int | None = None  # a row sees only its own chunk of positions
    softcap: float | None = None
    sinks_H: Tensor | None = None
    together: bool = False  # rows of one image see one another
    rough: bool = False  # for a model that only guesses: torch's own kernel, in the dtype of the keys
    kept: KeptRows = WHOLE  # how the keys and values lie that it reads

    @property
    def local(self) -> bool:
        return self.window is not None or self.chunk is not None


@dataclass(frozen=True)
class Visibility:
    """Positions and depth-first intervals of key rows; the last rows of the keys are the queries themselves.

    The first `committed` keys are the text, of which `dropped` tokens behind the first SINKS have no key any more: key
    i has position i, or i + dropped, and every query sees it. The others are nodes.
    position_R, enter_R, leave_R: int64 over the nodes only, on the device of the keys. So is image_R, if any node is a
    row of an image: alike for those of one image, -1 for all others.
    """

    committed: int
    position_R: Tensor
    enter_R: Tensor
    leave_R: Tensor
    image_R: Tensor | None = None
    dropped: int = 0
    _kept: dict[tuple[int | None, ...], Tensor | None] = field(default_factory=dict, compare=False, repr=False)
    _masks: dict[tuple[int | None, ...], Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    def positions(self, first: int, last: int) -> Tensor:
        """Positions of the keys first … last - 1."""
        text = torch.arange(min(first, self.committed), min(last, self.committed), device=self.position_R.device)
        text = positions_of(text, self.dropped)
        nodes = self.position_R[max(first - self.committed, 0) : max(last - self.committed, 0)]
        return torch.cat([text, nodes])

    def hidden(self, queries: slice, first: int, last: int, style: Style) -> Tensor | None:
        """True where a query (a slice of the nodes) must not see the keys first … last - 1; None if it sees all.

        Small ones are kept, since they are the same in all layers of a kind.
        """
        block = queries.start, queries.stop, first, last, style.window, style.chunk, style.together
        if block in self._kept:
            return self._kept[block]
        found_QK = self._hidden(queries, first, last, style)
        if found_QK is None or found_QK.numel() <= KEPT:
            self._kept[block] = found_QK
        return found_QK

    def mask(self, queries: slice, seen: range, style: Style, times: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to scores of the keys `seen`, [Q * times, K]: the same for so many heads; None for nothing."""
        block = queries.start, queries.stop, seen.start, seen.stop, style.window, style.chunk, times
        if block not in self._masks:
            hidden_QK = self.hidden(queries, seen.start, seen.stop, style)
            added_QK = None if hidden_QK is None else torch.where(hidden_QK, -torch.inf, 0.0).to(dtype).repeat(times, 1)
            if added_QK is not None and added_QK.numel() > KEPT:
                return added_QK
            self._masks[block] = added_QK
        return self._masks[block]

    def _hidden(self, queries: slice, first: int, last: int, style: Style) -> Tensor | None:
        position_Q1 = self.position_R[queries].unsqueeze(1)
        hidden_QK: Tensor | None = None
        ahead = last <= self.committed + queries.start  # of a prompt: all of them are ancestors of every query
        if last > self.committed + 1 and not (ahead and queries.start > KEY_BLOCK and last <= self._chain):
            enter_Q1 = self.enter_R[queries].unsqueeze(1)
            nodes = slice(max(first - self.committed, 0), last - self.committed)
            stranger_QK = (enter_Q1 < self.enter_R[nodes]) | (enter_Q1 >= self.leave_R[nodes])
            if style.together and self.image_R is not None:
                image_Q1 = self.image_R[queries].unsqueeze(1)
                stranger_QK &= (image_Q1 != self.image_R[nodes]) | (image_Q1 < 0)
            text = max(self.committed - first, 0)
            hidden_QK = nn.functional.pad(stranger_QK, (text, 0))
        if style.local:
            position_K = self.positions(first, last)
            if style.window is not None:
                far_QK = position_Q1 - position_K >= style.window
            else:
                assert style.chunk is not None
                far_QK = position_Q1 // style.chunk != position_K // style.chunk
            hidden_QK = far_QK if hidden_QK is None else hidden_QK | far_QK
        return hidden_QK

    @cached_property
    def _chain(self) -> int:
        """How many keys from the first on are ancestors of every later one: the text, and a prompt behind it."""
        parted_R = self.leave_R < self.leave_R.max()  # children were visited in their order (`intervals`)
        return self.committed + (int(parted_R.int().argmax()) if bool(parted_R.any()) else len(parted_R))

    def first_visible(self, queries: slice, style: Style) -> int:
        """No query of the slice sees a committed key before this one."""
        return min(self._first(queries, style), self.committed)

    def first_needed(self, queries: slice, style: Style) -> int:
        """The same of all keys; of those that the sweep brings whole blocks alone are left out."""
        first = self._first(queries, style)
        if first <= self.committed or self.image_R is not None:
            return min(first, self.committed)
        return max(self.committed, min(first, self._chain) // KEY_BLOCK * KEY_BLOCK)

    def _first(self, queries: slice, style: Style) -> int:
        """Of a chain of so many keys the first that is near enough to be seen."""
        if not style.local:
            return 0
        lowest = int(self.position_R[queries].min())
        if style.window is not None:
            seen = max(lowest - style.window + 1, 0)
        else:
            assert style.chunk is not None
            seen = lowest // style.chunk * style.chunk
        return max(seen - self.dropped, min(seen, SINKS))


def positions_of(rows_R: Tensor, dropped: int) -> Tensor:
    """Positions of rows of a text of which so many tokens behind the first SINKS have no row any more."""
    return torch.where(rows_R < SINKS, rows_R, rows_R + dropped) if dropped else rows_R


def attend(
    query_HQD: Tensor, key_HKD: Tensor, value_HKD: Tensor, sees: Visibility, rows: slice, style: Style
) -> Tensor:
    """Attention of the nodes `rows` over committed text and nodes, [H, Q, D of values] in the dtype of the query.

    Keys hold the committed rows and then the nodes, at least up to `rows.stop`.
    """
    blocks = []
    for start in range(rows.start, rows.stop, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, rows.stop))
        # Nodes are ordered: no ancestor comes later, only rows of the same image.
        end = sees.committed + (rows.stop if style.together and sees.image_R is not None else queries.stop)
        block = query_HQD[:, start - rows.start : queries.stop - rows.start]
        seen = range(sees.first_needed(queries, style), end)
        if style.rough and style.softcap is None and style.sinks_H is None:
            blocks.append(_attend_roughly(block, key_HKD, value_HKD, sees, queries, seen, style))
            continue
        hidden = partial(sees.hidden, queries, style=style)
        blocks.append(attend_block(block, key_HKD, value_HKD, seen, hidden, style))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _attend_roughly(
    query_HQD: Tensor, key_HKD: Tensor, value_HKD: Tensor, sees: Visibility, queries: slice, seen: range, style: Style
) -> Tensor:
    """The same of some queries in one call; heads that share keys lie side by side."""
    heads, count, _ = query_HQD.shape
    mask = sees.mask(queries, seen, style, heads // len(key_HKD), query_HQD.dtype)
    mixed = nn.functional.scaled_dot_product_attention(
        query_HQD.reshape(1, len(key_HKD), heads // len(key_HKD) * count, -1),
        key_HKD[None, :, seen.start : seen.stop],
        value_HKD[None, :, seen.start : seen.stop],
        attn_mask=mask,
        scale=style.scale,
    )
    return mixed.view(heads, count, -1)


def attend_block(
    query_HQD: Tensor,
    key_HKD: Tensor,
    value_HKD: Tensor,
    seen: range,
    hidden: Callable[[int, int], Tensor | None],
    style: Style,
    texts: int = 1,
) -> Tensor:
    """Attention over the keys of the rows `seen`, block by block: [H, Q, D of values] in the dtype of the query.

    query_HQD: floats of any dtype; key_HKD, value_HKD: as `style.kept` reads them. Sums are in float32, or in float64
    with queries of that; H is a multiple of the heads of keys. Of B texts the heads come one text after the other.
    `hidden(first, last)` is True where a query must not see the keys first … last - 1, bool [Q, K] or [B, 1, 1, Q, K];
    None where it sees all of them. Every query must see a key, or there must be sinks: else the result is NaN.

    Each block brings the highest score m, the sum s of exp(score - m) and the sum o of exp(score - m) * value. Two
    blocks merge by m = max(m1, m2), s = s1 exp(m1 - m) + s2 exp(m2 - m), o alike; the result is o / s (Milakov and
    Gimelshein 2018, algorithm 3; FlashAttention, Dao et al. 2022, algorithm 1). Three keys with scores log 1, log 2 and
    log 5 weigh 1/8, 2/8 and 5/8; with the values 8, 4 and 0 that makes 8/8 + 8/8 + 0 = 2, in one block or in two:

    >>> query = torch.ones(1, 1, 1)
    >>> key = torch.tensor([1.0, 2.0, 5.0]).log().reshape(1, 3, 1)
    >>> value = torch.tensor([8.0, 4.0, 0.0]).reshape(1, 3, 1)
    >>> def found(hidden: Tensor | None = None) -> float:
    ...     seen = lambda first, last: None if hidden is None else hidden[:, first:last]
    ...     return round(attend_block(query, key, value, range(3), seen, Style(scale=1.0)).item(), 4)
    >>> found()
    2.0
    >>> from unittest.mock import patch
    >>> with patch(f"{__name__}.KEY_BLOCK", 2):  # m = log 2, s = 3/2, o = 8/2 + 4 = 8; then m = log 5, s = 1, o = 0
    ...     found()  # m = log 5, s = 3/2 * 2/5 + 1 = 1.6, o = 8 * 2/5 + 0 = 3.2
    2.0
    >>> found(torch.tensor([[False, False, True]]))  # the third key is not an ancestor: 8/3 + 8/3
    5.3333
    """
    heads, queries, _ = query_HQD.shape
    key_heads, start, end = len(key_HKD), seen.start, seen.stop
    if heads // key_heads * queries < FILLED:
        times = -(-FILLED * key_heads // (heads * queries))

        def hidden_often(first: int, last: int) -> Tensor | None:
            masked = hidden(first, last)
            return None if masked is None else torch.cat([masked] * times, dim=-2)

        often_HQD = query_HQD.expand(-1, times, -1) if queries == 1 else query_HQD.repeat(1, times, 1)
        return attend_block(often_HQD, key_HKD, value_HKD, seen, hidden_often, style, texts)[:, :queries]
    # Heads that share keys lie side by side in one product: no copy of the keys for grouped queries.
    shared = (texts, key_heads // texts, heads // key_heads, queries)
    stacked = (key_heads, heads // key_heads * queries)
    query = (query_HQD.to(torch.promote_types(query_HQD.dtype, torch.float32)) * style.scale).reshape(*stacked, -1)

    def scored(first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Scores [B, heads of keys, G, Q, K] of some keys."""
        keys = style.kept.read(key_HKD[:, first:last])
        if (missing := FILLED - (last - first)) > 0:
            products = torch.bmm(query, nn.functional.pad(keys, (0, 0, 0, missing)).transpose(1, 2))
            products = products[..., : last - first].contiguous()
        else:
            products = torch.bmm(query, keys.transpose(1, 2), out=out)
        scores = products.view(*shared, last - first)
        # In place: a block of scores is the largest thing that attention holds.
        if style.softcap is not None:
            scores.div_(style.softcap).tanh_().mul_(style.softcap)
        masked = hidden(first, last)
        return scores if masked is None else scores.masked_fill_(masked, -torch.inf)

    def mixed_by(weights: Tensor, first: int, last: int) -> Tensor:
        """Sums of values [heads of keys, G * Q, D] by their weights."""
        weights, mixed = weights.view(*stacked, -1), None
        for keys in aligned(first, last, SUMMED):
            part = torch.bmm(weights[..., keys.start - first : keys.stop - first], style.kept.read(value_HKD[:, keys]))
            mixed = part if mixed is None else mixed.add_(part)
        assert mixed is not None, "there is a key"
        return mixed

    blocks = list(aligned(start, end, KEY_BLOCK))
    if style.sinks_H is None and len(blocks) == 1 and texts * queries <= AT_ONCE:
        scores = scored(start, end)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()  # the same steps as below: the same bits
        mixed = mixed_by(weights, start, end).view(*shared, -1) / _total(weights, start)
        return mixed.view(heads, queries, -1).to(query_HQD.dtype)
    found: tuple[Tensor, Tensor, Tensor] | None = None  # highest, total and mixed of the blocks so far
    if style.sinks_H is not None:  # a sink is a key with a logit and no value: it is there before the first block
        highest = style.sinks_H.to(query.dtype).reshape(1, *shared[1:3], 1, 1).expand(*shared, 1)
        found = highest, torch.ones_like(highest), query.new_zeros((*shared, 1))
    # One piece of memory for the scores of every block, of one size however many keys there are: blocks that each ask
    # for a little more than the last leave holes that nothing fills.
    memory = query.new_empty(heads * queries * (KEY_BLOCK if texts == 1 else end))
    for keys in blocks:
        first, last = keys.start, keys.stop
        block = memory[: heads * queries * (last - first)].view(*stacked, last - first)
        scores = scored(first, last, out=block)
        highest = scores.amax(-1, keepdim=True)
        highest = highest.clamp_(min=LOWEST) if found is None else torch.maximum(found[0], highest)
        weights = scores.sub_(highest).exp_()
        mixed, total = mixed_by(weights, first, last).view(*shared, -1), _total(weights, first)
        if found is not None:
            fade = torch.exp(found[0] - highest)
            mixed, total = found[2] * fade + mixed, found[1] * fade + total
        found = highest, total, mixed
    return (mixed / total).reshape(heads, queries, -1).to(query_HQD.dtype)


def _total(weights: Tensor, first: int) -> Tensor:
    """Sums over keys from number `first` on, float32 [..., 1], that those of weight 0 on either side do not change.

    A kernel's order follows how many it sums: so always SUMMED at a time, and their sums in float64.
    """
    last = first + weights.shape[-1]
    if first // SUMMED == (last - 1) // SUMMED:
        return nn.functional.pad(weights, (first % SUMMED, -last % SUMMED)).sum(-1, keepdim=True).float()
    start, stop = min(-(-first // SUMMED) * SUMMED, last), max(last // SUMMED * SUMMED, first)
    total = weights.new_zeros((*weights.shape[:-1], 1), dtype=torch.float64)
    if start < stop:
        whole = weights[..., start - first : stop - first].unflatten(-1, (-1, SUMMED))
        total += whole.sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    for keys in aligned(first, last, SUMMED):
        if keys.stop - keys.start < SUMMED:
            part = weights[..., keys.start - first : keys.stop - first]
            filling = (keys.start % SUMMED, -keys.stop % SUMMED)
            total += nn.functional.pad(part, filling).sum(-1, keepdim=True)
    return total.float()


def aligned(start: int, end: int, size: int) -> Iterator[slice]:
    """The numbers from `start` to `end` - 1 in blocks that end at multiples of `size`, wherever the first begins."""
    while start < end:
        stop = min((start // size + 1) * size, end)
        yield slice(start, stop)
        start = stop


def warmer(query_HQD: Tensor, position_Q: Tensor, floor: float, scale: float) -> Tensor:
    """Queries that grow with their position, in their dtype: times 1 + scale * log(1 + (position + 1) // floor).

    Llama 4's layers without rotary embeddings (arXiv 2501.19399); transformers counts rows of the cache instead.
    """
    factor_Q = torch.log1p(torch.floor((position_Q.float() + 1.0) / floor)) * scale + 1.0
    return (query_HQD * factor_Q[None, :, None]).to(query_HQD.dtype)


def leave_temperatures(model: nn.Module) -> None:
    """Attention of this model leaves it to `warmer` to scale its queries. Harmless when repeated."""
    for module in every_module(model):
        if getattr(module, "attn_temperature_tuning", False):
            vars(module)["attn_temperature_tuning"] = False


@dataclass(frozen=True)
class LayerRows:
    """What a layer hands over for the next rows of a sweep. `index_QF` are rows of an index (`indexed.py`)."""

    layer: int
    query_HQD: Tensor
    key_HKD: Tensor
    value_HKD: Tensor
    asked: Style
    index_QF: Tensor | None = None


class PackedRows(Protocol):
    """What the registered function needs of a sweep: somewhere to keep keys, and which keys each row sees."""

    def attend(self, rows: LayerRows) -> Tensor:
        """What the rows find, contiguous [Q, H, D]: some layers take a view of it."""


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    sweep: PackedRows | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, Q, D] in, [1, Q, H, D] out. `sweep` rides through as a keyword.

    `indices` or `block_indices` are rows of an index (`indexed.py`), whose layers may have a mask that says nothing.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    if sweep is None:
        raise UnsupportedArchitecture(f"layer {layer} hands nothing on to its attention, which cannot be given a tree.")
    indices = block_indices if indices is None else indices
    masked = attention_mask is not None and indices is None
    assert not masked, "visibility comes with the rows; a mask on top would be ignored"
    style = Style(scale=scaling, window=sliding_window, softcap=softcap, sinks_H=s_aux)
    index_QF = None if indices is None else indices[0]
    return sweep.attend(LayerRows(layer, query[0], key[0], value[0], style, index_QF)).unsqueeze(0), None


AttentionInterface.register(NAME, _packed_attention)
