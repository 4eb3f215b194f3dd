"""Attention to a text that another model has read: a drafter's queries, its target's keys and values.

What taps.py is for hidden states: of the layers that are asked for, the rows of the committed text, where they lie. The
nodes of a sweep, running or over, are never among them, because they were not committed.
R rows   H heads   D width of a head
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from specexec.model.attention import LayerRows, Style, attend_block
from specexec.model.cache import KVCache
from specexec.model.kept_rows import KeptRows
from specexec.sizes import SINKS


@dataclass(frozen=True)
class KeyReader:
    """So many rows of a drafter, one after another, and the cache of the text that they attend to."""

    rows: int
    cache: KVCache


class ReadText:
    """What attention is asked for in one pass of a drafter: its layer i attends to the target's layer `layers[i]`.

    `kept` is how that target keeps its rows. With a `window` no row sees more than the first tokens and so many last
    ones.
    A drafter's layer with a window of its own sees what is not farther from the last token than that many.
    """

    def __init__(
        self, readers: Items[KeyReader], layers: Items[int], kept: KeptRows, window: int | None = None
    ) -> None:
        self._readers, self._layers, self._kept, self._window = readers, layers, kept, window

    def attend(self, rows: LayerRows) -> Tensor:
        """What the rows of all readers find, [R, H, D]; every row sees the whole text, and no other row."""
        layer, dtype = self._layers[rows.layer], rows.query_HQD.dtype
        style = Style(rows.asked.scale, softcap=rows.asked.softcap, sinks_H=rows.asked.sinks_H, kept=self._kept)
        query_HRD, found = self._kept.queries(rows.query_HQD), list[Tensor]()
        pieces = query_HRD.split([reader.rows for reader in self._readers], 1)
        for reader, own_HRD in zip(self._readers, pieces, strict=True):
            key_HKD, value_HKD = self._seen(reader.cache, layer, rows.asked.window)
            mixed_HRD = attend_block(own_HRD, key_HKD, value_HKD, range(key_HKD.shape[1]), _all_of_them, style)
            found.append(self._kept.found(mixed_HRD, dtype).transpose(0, 1))
        return torch.cat(found)

    def _seen(self, cache: KVCache, layer: int, near: int | None) -> tuple[Tensor, Tensor]:
        kv, text = cache.layers[layer], cache.rows
        first = 0 if near is None else max(text - 1 - near, 0)
        both = kv.keys_HRD[:, first:text], kv.values_HRD[:, first:text]
        if self._window is None or text - first <= SINKS + self._window:
            return both
        keys, values = (
            rows_HRD[:, -self._window :] if first else torch.cat([rows_HRD[:, :SINKS], rows_HRD[:, -self._window :]], 1)
            for rows_HRD in both
        )
        return keys, values


def _all_of_them(first: int, last: int) -> None:
    """No key is hidden."""
